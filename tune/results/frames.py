"""A study's results for notebooks: pandas tables, and a report that shows itself."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune.records.trials import TrialRecord
from tune.results.outcome import Outcome

if TYPE_CHECKING:
    import pandas as pd


def trials_frame(outcome: Outcome) -> pd.DataFrame:
    """All trials, a row each.

    Returns:
        Index `number`. Columns, from left to right: `state`; the goals; what the search chose; the other validation
        metrics of the epoch that counts; `confirmed`, the mean of the first goal over fresh seeds or folds, if there
        are any; `epochs`, `best_epoch`, `train_s`, `wall_s` (seconds), `error`; all other settings of the trials. Of
        two columns with one name the first is kept.
    """
    import pandas as pd

    trials = [parts_of(record, outcome) for record in outcome.records]
    columns = dict.fromkeys(name for parts in zip(*trials, strict=True) for part in parts for name in part)
    rows = [{name: value for part in reversed(parts) for name, value in part.items()} for parts in trials]
    numbers = pd.Index([record.number for record in outcome.records], name="number")
    return pd.DataFrame(rows, index=numbers, columns=list(columns))


def parts_of(record: TrialRecord, outcome: Outcome) -> list[Mapping[str, Any]]:
    """A trial's row of `trials_frame` in parts; of two values with one name the first counts."""
    confirmed = outcome.confirmations.get(record.number)
    return [
        {"state": str(record.state)},
        {name: record.value(name) for name, _ in outcome.goals},
        record.searched,
        record.metrics,
        {"confirmed": sum(confirmed) / len(confirmed)} if confirmed else {},
        {"epochs": len(record.epochs), "best_epoch": record.best_epoch},
        {f"{name}_s": record.seconds.get(name) for name in ("train", "wall")},
        {"error": record.error},
        record.settings,
    ]


def test_frame(tests: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """The test scores.

    Args:
        tests: as `Outcome.tests`: of "winner", "guide", "difference" and the baselines, by metric.

    Returns:
        A row a metric; for each of them the columns `value`, `low` and `high`, the last two being the 95 % interval
        (NaN: there is none). Empty before the test.
    """
    import pandas as pd

    def cells(score: Mapping[str, Any]) -> dict[str, float | None]:
        low, high = score["interval"] or (None, None)
        return {"value": score["value"], "low": low, "high": high}

    columns = {
        (who, part): {name: cells(score)[part] for name, score in scores.items()}
        for who, scores in tests.items()
        for part in ("value", "low", "high")
    }
    return pd.DataFrame(columns, dtype=float)


class ReportPath(type(Path())):  # type: ignore[misc]  # Python 3.11 has no public class to derive from
    """The path of report.html. A notebook shows the report itself."""

    def _repr_html_(self) -> str:
        """The report in a frame of its own. It runs no scripts: a study's folder may come from a stranger."""
        page = html.escape(self.read_text(encoding="utf-8"))
        return f'<iframe srcdoc="{page}" sandbox="" style="width: 100%; height: 40em; border: 1px solid #ccc"></iframe>'
