"""Many runs in one table and one plot: a multirun folder, or any folder of run folders."""

from __future__ import annotations

import csv
import html
import io
import itertools
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.box import SIMPLE_HEAD
from rich.table import Table
from yaml import YAMLError

from qat.errors import CheckpointError
from qat.reporting.html import page, scatter_chart, table_of
from qat.reporting.table import Results, read_csv

REPEATS = ("seed", "data.seed", "fold", "data.fold")
"""Settings that repeat a run rather than change it: runs that differ in nothing else are averaged."""


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Attributes:
        name: of its folder.
        config: its ``config.yaml``, flat: {"trainer.max_epochs": 30, ...}.
        results: its table; None while it is not finished.
        stages: names of the stages that are finished.
    """

    name: str
    config: Mapping[str, Any]
    results: Results | None
    stages: Sequence[str]

    @property
    def title(self) -> str:
        """The name without Hydra's job number."""
        number, _, rest = self.name.partition("_")
        return rest if number.isdigit() and rest else self.name

    def scores(self) -> dict[str, float]:
        """Score of each model of the table."""
        return {} if self.results is None else {row.model: row.score for row in self.results.rows}


@dataclass(frozen=True)
class Sweep:
    """The jobs of a folder, sorted by number; those that differ only in seed or fold stand together."""

    folder: str
    jobs: Sequence[Job]

    @property
    def unfinished(self) -> list[Job]:
        return [job for job in self.jobs if job.results is None]

    def varying(self, title: str | None = None) -> list[str]:
        """The settings that differ between jobs, without the recipe's details (its name is in the job's).

        Args:
            title: look at the jobs of this title only: a recipe brings a schedule with it, which is no news.
        """
        jobs = [job for job in self.jobs if title is None or job.title == title]
        keys = sorted({key for job in jobs for key in job.config})
        return [key for key in keys if not key.startswith("recipe.")
                and len({json.dumps(job.config.get(key)) for job in jobs}) > 1]

    def groups(self) -> dict[str, list[Job]]:
        """Finished jobs by what they are, those that only repeat each other in one list; names are unique."""
        groups: dict[str, list[Job]] = {}
        for job in self.jobs:
            if job.results is not None:
                alike = {k: v for k, v in job.config.items() if k not in REPEATS} | {"": job.results.metric}
                groups.setdefault(json.dumps(alike, sort_keys=True), []).append(job)
        named: dict[str, list[Job]] = {}
        for jobs in groups.values():
            shown = [key for key in self.varying(jobs[0].title) if key not in REPEATS]
            name = " ".join([jobs[0].title, *(f"{key}={_shown(jobs[0].config.get(key))}" for key in shown)])
            named[name if name not in named else f"{name} ({jobs[0].name})"] = jobs
        return named

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Headers and rows as text: means over the repeats, with the standard deviation where there are several."""
        headers = ["run", "repeats", "metric", "float", "control", "PTQ", "QAT", "deployed", "gap", "bytes", "of float",
                   "latency"]
        rows = []
        for name, jobs in self.groups().items():
            scores = [job.scores() for job in jobs]
            columns = [[one[model] for one in scores if model in one]
                       for model in ("float", "control", "ptq", "qat", "deployed")]
            gaps = [one["deployed"] - one["control"] for one in scores if {"deployed", "control"} <= one.keys()]
            sizes, whole = _column(jobs, "deployed", "bytes"), _column(jobs, "float", "bytes")
            latency = _column(jobs, "deployed", "latency_ms")
            assert jobs[0].results is not None
            share = jobs[0].results.proportion
            rows.append([
                name, str(len(jobs)), jobs[0].results.metric,
                *(_spread(values, share) for values in columns), _spread(gaps, share, sign="+"),
                f"{statistics.mean(sizes):,.0f}" if sizes else "",
                f"{statistics.mean(sizes) / statistics.mean(whole):.2f}x" if sizes and whole else "",
                f"{statistics.mean(latency):.2f} ms" if latency else "",
            ])  # fmt: skip
        return headers, rows

    def render(self) -> Table:
        """For ``rich.print``: narrow, so without bytes, and without what is the same for all."""
        headers, rows = self.cells()
        left_out = {"bytes", *(h for h in ("repeats", "metric") if len({row[headers.index(h)] for row in rows}) == 1)}
        kept = [i for i, header in enumerate(headers) if header not in left_out]
        caption = "gap: deployed less control. Means over the repeats, ± their standard deviation."
        for job in self.unfinished:
            caption += f"\n{job.name} is not finished (done: {', '.join(job.stages) or 'nothing'})."
        table = Table(title=f"{len(self.jobs)} runs of {self.folder}", caption=caption, caption_justify="left",
                      box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
        for i in kept:
            table.add_column(headers[i], justify="right" if i else "left", overflow="fold")
        for row in rows:
            table.add_row(*(row[i] for i in kept))
        return table

    def csv(self) -> str:
        """One line for each model of each finished job, in full precision, with the settings that vary."""
        varying = self.varying()
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["job", *varying, "metric", "model", "score", "bytes", "latency_ms", "bit_equal", "examples"])
        for job in self.jobs:
            if job.results is not None:
                settings = [_shown(job.config.get(key)) for key in varying]
                for row in job.results.rows:
                    writer.writerow([job.name, *settings, job.results.metric, row.model, row.score, row.bytes,
                                     row.latency_ms, job.results.bit_equal, job.results.examples])
        return out.getvalue()

    def html(self) -> str:
        """A page with the table, and a plot of score against bytes for each metric."""
        headers, rows = self.cells()
        figures = []
        for metric in dict.fromkeys(row[2] for row in rows):
            points: dict[str, list[tuple[float, float]]] = {}
            for name, jobs in self.groups().items():
                if jobs[0].results is not None and jobs[0].results.metric == metric:
                    points |= {f"{label}{name}": at for label, at in _points(jobs) if at}
            figures.append(f"<figure><figcaption>{html.escape(metric)} against bytes of the weights file; hollow: "
                           f"float</figcaption>{scatter_chart(points)}</figure>")
        missing = "".join(f"<p class='soft'>{html.escape(job.name)} is not finished.</p>" for job in self.unfinished)
        return page(
            f"{self.folder}: {len(self.jobs)} runs",
            f"<h2>Results</h2>{table_of(headers, rows, 'results')}{missing}"
            "<p class='soft'>gap: deployed less control. Means over the repeats, ± their standard deviation.</p>"
            f"<h2>Size</h2><div class='curves'>{''.join(figures)}</div>",
        )  # fmt: skip


def read_sweep(folder: Path) -> Sweep:
    """Every run folder right below ``folder``, finished or not.

    Raises:
        CheckpointError: there is none, or the files of one are damaged.
    """
    def number(path: Path) -> tuple[float, str]:
        head = path.name.partition("_")[0]
        return (int(head) if head.isdigit() else float("inf")), path.name

    jobs = []
    for path in sorted((p.parent for p in folder.glob("*/config.yaml")), key=number):
        try:
            config = OmegaConf.to_container(OmegaConf.load(path / "config.yaml"), resolve=True)
        except (OmegaConfBaseException, YAMLError, OSError) as error:
            raise CheckpointError(f"{path / 'config.yaml'} cannot be read: {error}") from error
        results = read_csv(path / "results.csv") if (path / "results.csv").exists() else None
        stages = sorted((p for p in (path / "stages").glob("*.json")), key=lambda p: p.stat().st_mtime)
        jobs.append(Job(path.name, dict(_flat(config)), results, [p.stem for p in stages]))
    if not jobs:
        raise CheckpointError(f"{folder} holds no runs: no folder below it has a config.yaml.")
    return Sweep(folder.resolve().name, jobs)


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _points(jobs: Sequence[Job]) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    for label, model in (("", "deployed"), ("float ", "float")):
        rows = [row for job in jobs if job.results for row in job.results.rows if row.model == model]
        yield label, [(row.bytes, row.score) for row in rows]


def _column(jobs: Sequence[Job], model: str, field: str) -> list[float]:
    rows = itertools.chain.from_iterable(job.results.rows for job in jobs if job.results)
    return [getattr(row, field) for row in rows if row.model == model]


def _spread(values: Sequence[float], share: bool, sign: str = "") -> str:
    """``98.05 ± 0.31%`` for shares of 1, else ``2.331 ± 0.004``."""
    if not values:
        return ""
    factor, unit, digits = (100.0, "%", ".2f") if share else (1.0, "", ".4g")
    text = f"{statistics.mean(values) * factor:{sign}{digits}}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values) * factor:{digits}}"
    return text + unit


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
