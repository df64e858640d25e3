"""How long the rest of a sweep may take, judged by the finished runs that are most like each of the rest."""

from collections.abc import Iterator
from statistics import mean

from dual_lora.lab.config.schema import Settings
from dual_lora.lab.record.summary import format_seconds


def iterate_kinds(settings: Settings) -> Iterator[tuple]:
    """Yield keys that similar runs share, from the most specific to none. Learning rate and seed do not affect the
    time, so they are in no key."""
    train, where = settings.train, (settings.model.name, settings.task.name)
    yield *where, settings.method.name, settings.method.rank, train.max_steps, train.epochs, train.batch_size
    yield *where, settings.method.name
    yield where
    yield ()


class TimeLeft:
    """The seconds that runs took, by their kinds."""

    def __init__(self) -> None:
        self.took: dict[tuple, list[float]] = {}

    def add_run(self, settings: Settings, seconds: float) -> None:
        """Note how many seconds a run took."""
        for kind in iterate_kinds(settings):
            self.took.setdefault(kind, []).append(seconds)

    def estimate_seconds(self, settings: Settings) -> float:
        """Return the seconds that a run may take, as the runs most like it did."""
        return mean(next(self.took[kind] for kind in iterate_kinds(settings) if kind in self.took))

    def describe_time(self, all_settings: list[Settings]) -> str:
        """Return the estimated time left, or that it is unknown until one run has finished."""
        if not self.took:
            return "time left not known before a run is done"
        return f"about {format_seconds(sum(map(self.estimate_seconds, all_settings)))} left"
