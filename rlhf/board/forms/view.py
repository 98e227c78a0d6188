"""What the templates show of a form: each input with its texts, in the reader's language."""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhf.board.forms import rows
from rlhf.board.forms.basic import TERMS
from rlhf.board.forms.fields import Field, Widget
from rlhf.board.forms.filling import Filled, named
from rlhf.board.forms.offers import OFFERED
from rlhf.board.forms.rows import ROWS, Row
from rlhf.board.forms.values import TOLD, Problem, in_signs, last, texts
from rlhf.board.rendering import words
from rlhf.board.said import Said, said
from rlhf.cli import presets

_TALL = 6  # lines of a list's box, at most


@dataclass(frozen=True)
class Input:
    """One field as the page has it."""

    field: Field
    name: str  # of the form's value
    id: str
    label: str
    sentence: Said
    facts: str  # range and unit
    values: Sequence[str]
    given: str | None  # the presets' value where another stands here
    problem: str | None
    terms: Sequence[str] = ()
    rows: Sequence["Entry"] = ()

    @property
    def offer(self) -> str | None:
        """The list of what may be chosen here, beside anything else."""
        return OFFERED.get(self.name)

    @property
    def value(self) -> str:
        """The one text."""
        return last(self.values)

    @property
    def lines(self) -> int:
        """How tall a box of several lines is."""
        return max(2, min(_TALL, self.value.count("\n") + 2))

    @property
    def has_problem(self) -> bool:
        """Whether something stands against it, or against one of its rows."""
        return self.problem is not None or any(row.has_problem for row in self.rows)


@dataclass(frozen=True)
class Entry:
    """One row of a dictionary or of a list of steps."""

    number: int
    name: str  # of the form's value
    id: str
    text: str
    fixed: bool
    problem: str | None
    first: Sequence[Input]
    folded: Sequence[Input]

    @property
    def has_problem(self) -> bool:
        """Whether something stands against it."""
        return self.problem is not None or any(each.problem for each in (*self.first, *self.folded))


@dataclass(frozen=True)
class Folded:
    """A group of the page: its preset and its sections."""

    name: str
    preset: Input | None
    sections: Sequence[tuple[str, Sequence[Input]]]

    @property
    def is_open(self) -> bool:
        """Whether something inside needs to be seen."""
        inside = [each for _, section in self.sections for each in section]
        if self.preset is not None:
            inside.append(self.preset)
        return any(each.has_problem for each in inside)


def id_of(name: str) -> str:
    """The id of an input, also as the fragment of a link."""
    return "f-" + re.sub(r"[^\w-]", "-", name, flags=re.ASCII)


class View:
    """A filled form in one language."""

    def __init__(self, filled: Filled, language: str, t: Callable[..., str]) -> None:
        self._filled, self._language, self._t = filled, language, t
        self._words = words(language)

    def basic(self) -> list[Input]:
        """The fields that come first; where a run is there already, what may be done with it."""
        found = []
        for each in self._filled.form.basic:
            found.append(self.input(each))
            if each.key == "run.name" and self._is_decided:
                found += [self.input(field) for field in self._deciding()]
        return found

    @property
    def _is_decided(self) -> bool:
        changed = self._filled.changed
        return self._filled.is_taken or "run.resume" in changed or "run.overwrite" in changed

    def _deciding(self) -> list[Field]:
        keys = ("run.resume", "run.overwrite")
        return [field for field in self._filled.form.options if field.key in keys]

    def groups(self) -> list[Folded]:
        """All other fields."""
        left_out = [field.key for field in self._deciding() if self._is_decided]
        found = []
        for group in self._filled.form.groups:
            preset = None
            if group.preset is not None:
                preset = self.input(group.preset)
            sections = []
            for title, fields in group.sections:
                here = [self.input(field) for field in fields if field.key not in left_out]
                sections.append((title, here))
            if preset is not None or sections:
                found.append(Folded(group.name, preset, sections))
        return found

    def input(self, of: Field) -> Input:
        """A field of the form."""
        if of.widget is Widget.preset:
            return self._preset(of)
        assert of.option is not None
        entries = [self._entry(of, i, row) for i, row in enumerate(self._rows(of))]
        values = self._filled.texts.get(of.key, [])
        base = self._filled.base
        given = None
        if base is not None and of.key in self._filled.changed and of.widget not in ROWS:
            given = ", ".join(texts(of, base.values[of.key])) or self._t("forms.unset")
        return self._input(of, of.key, values, given=given, entries=entries, key=of.key)

    def _rows(self, of: Field) -> Sequence[Row]:
        return self._filled.rows.get(of.key, [])

    def _preset(self, of: Field) -> Input:
        chosen = self._filled.presets.chosen[of.key]
        problem = self._filled.problems.get(of.key)
        return Input(
            of,
            of.key,
            id_of(of.key),
            self._words.get(f"forms.label.{of.key}", of.key),
            Said(self._words.get(f"forms.preset.{of.key}", "")),
            "",
            [chosen],
            None,
            self._told(problem),
            TERMS.get(of.key, ()),
        )

    def _input(
        self,
        of: Field,
        name: str,
        values: Sequence[str],
        *,
        problem: Problem | None = None,
        given: str | None = None,
        entries: Sequence[Entry] = (),
        key: str | None = None,
    ) -> Input:
        problem = problem or self._filled.problems.get(name)
        return Input(
            of,
            name,
            id_of(name),
            self._words.get(f"forms.label.{key}", of.key),
            self._sentence(of),
            self._facts(of),
            values,
            given,
            self._told(problem),
            TERMS.get(key or "", ()),
            entries,
        )

    def _entry(self, of: Field, number: int, row: Row) -> Entry:
        name = f"{of.key}#{number}"
        first: list[Input] = []
        folded: list[Input] = []
        for each in rows.fields_of_row(of, row.name):
            values = row.texts.get(each.key) or self._usual(each)
            made = self._input(each, f"{name}.{each.key}", values)
            is_first = of.widget is not Widget.items or each.required or _is_basic(of, each)
            if is_first:
                first.append(made)
            else:
                folded.append(made)
        problem = self._told(self._filled.problems.get(name))
        return Entry(number, name, id_of(name), row.name, row.fixed, problem, first, folded)

    def _usual(self, of: Field) -> Sequence[str]:
        if of.option is None or of.widget is Widget.table:
            return [""]
        return texts(of, rows.default_of(of))

    def _sentence(self, of: Field) -> Said:
        return Said("") if of.option is None else said(of.option.info.doc, self._language)

    def _facts(self, of: Field) -> str:
        if of.option is None:
            return ""
        info = of.option.info
        unit = ""
        if info.unit is not None:
            unit = said(info.unit, self._language).text
        return " ".join(part for part in (in_signs(info), unit) if part)

    def _told(self, problem: Problem | None) -> str | None:
        if problem is None:
            return None
        return self.words_of(problem)

    def words_of(self, problem: Problem) -> str:
        """A problem in the reader's language; what has no translation stands there in English,
        behind the options that it is about.
        """
        if problem.word != TOLD:
            return self._t(problem.word, **problem.values)
        message = problem.values["text"]
        found = said(message, self._language)
        if found.language is None:
            return found.text
        keys = named(message, self._filled)
        if not keys:
            return self._t("forms.error.english", text=message)
        return self._t("forms.error.english.about", names=", ".join(keys), text=message)

    def summary(self) -> list[tuple[str | None, str, str]]:
        """All problems: the id of the input or None, its label, the words."""
        found: list[tuple[str | None, str, str]] = [
            (None, "", self.words_of(problem)) for problem in self._filled.top
        ]
        for name, problem in self._filled.problems.items():
            label = self._words.get(f"forms.label.{name}", name.replace("#", " "))
            found.append((id_of(name), label, self.words_of(problem)))
        return found


def _is_basic(of: Field, each: Field) -> bool:
    """Whether an option of an item stands unfolded."""
    firsts = {
        "reward.terms": ("kind", "weight", "clip", "normalise"),
        "data.sources": ("path", "weight", "cap", "format", "columns"),
    }
    return each.key in firsts.get(of.key, ())


@functools.cache
def summaries(group: str, language: str) -> list[tuple[str, Said]]:
    """The presets of a group and what is particular to each."""
    pairs = [(name, presets.summary(group, name)) for name in presets.choices(group)]
    return [(name, said(text, language)) for name, text in pairs if text]


def preview(view: View, t: Callable[..., str]) -> str:
    """The problems as lines of text."""
    lines = [": ".join(filter(None, (label, text))) for _, label, text in view.summary()]
    return "\n".join(lines) or t("forms.problems.none")
