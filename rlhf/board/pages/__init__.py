"""The pages: a module each, with its routes made from what all pages share."""

from rlhf.board.app import Pages
from rlhf.board.pages import chat, data, doctor, jobs, labels, models, new, run, runs, start

PAGES: Pages = (
    start.routes,
    new.routes,
    runs.routes,
    run.routes,
    jobs.routes,
    data.routes,
    labels.routes,
    chat.routes,
    models.routes,
    doctor.routes,
)
