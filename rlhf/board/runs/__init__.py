"""Run directories as the pages show them: lists, curves, samples, facts, what comes next."""
