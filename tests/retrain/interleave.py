"""Drivers of one registered model that take turns at a real MLflow, in an order drawn from a seed.

Each driver is a thread that waits for its turn before every call of MLflow's client. Time passes in turns, too: each
pause of the lock moves its clock.
"""

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from olora_ray.common.errors import UserError
from olora_ray.retrain.gate import Decision
from olora_ray.retrain.recipe import ORIGIN
from olora_ray.retrain.run import apply_decision
from olora_ray.tracking.aliases import CHAMPION, LOCK, MOVE, PREVIOUS, Aliases, RegistryLock
from olora_ray.tracking.checksums import GATE, ROLLED_BACK, Version
from olora_ray.tracking.client import connect

CALL, PAUSE = 0.01, 2.0
"""Seconds of the lock's clock per call and per pause."""


class Killed(BaseException):
    """Stands for a process that dies between two calls of MLflow."""


class Turns:
    """Lets one thread run at a time."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.clock = 0.0
        self.waiting: dict[str, threading.Event] = {}
        self.running: set[str] = set()
        self.changed = threading.Condition()

    def wait(self) -> None:
        """Wait for the turn of this thread; do nothing in a thread outside the game."""
        name = threading.current_thread().name
        with self.changed:
            if name not in self.running:
                return
            mine = self.waiting[name] = threading.Event()
            self.changed.notify()
        mine.wait()

    def play(self, drivers: dict[str, Callable[[], None]]) -> None:
        """Run the drivers to their ends; raise the error of any of them."""
        problems: list[BaseException] = []

        def run(name: str, act: Callable[[], None]) -> None:
            self.wait()
            try:
                act()
            except BaseException as problem:
                problems.append(problem)
            with self.changed:
                self.running.remove(name)
                self.changed.notify()

        self.running = set(drivers)
        threads = [threading.Thread(target=run, args=item, name=item[0], daemon=True) for item in drivers.items()]
        for thread in threads:
            thread.start()
        while True:
            with self.changed:
                self.changed.wait_for(lambda: len(self.waiting) == len(self.running))
                if not self.running:
                    break
                self.waiting.pop(self.random.choice(sorted(self.waiting))).set()
        for problem in problems:
            raise problem


@dataclass
class Tally:
    """Counts over all interleavings."""

    interleavings: int = 0
    promoted: int = 0
    """Promotions by a gate."""
    refused: int = 0
    again: int = 0
    """Decisions that were repeated because the champion had changed."""
    by_hand: int = 0
    rolled_back: int = 0
    killed: int = 0
    stale: int = 0
    """Promotions by a gate against a champion that was not the current one."""
    against_hand: int = 0
    """Promotions by a gate of a version that a person had rolled back, or of its child."""
    inconsistent: list[str] = field(default_factory=list)


class Game:
    """One interleaving: champion 2, previous 1; the versions from 3 on want to become champion."""

    def __init__(self, aliases: Aliases, seed: int, tally: Tally) -> None:
        self.aliases, self.tally, self.turns = PlayedAliases(aliases, self), tally, Turns(seed)
        self.random = random.Random(seed + 1)
        self.real = connect(aliases.uri)
        self.loss = {str(number): self.random.random() for number in range(1, 7)}
        self.against: dict[str, str] = {}
        """Driver -> the champion that its last decision was made against."""
        self.expected: list[tuple[str, str | None]] = [("2", "1")]
        """Champion and previous after each move."""
        self.back: set[str] = set()
        self.kill_at: dict[str, int] = {}
        self.calls: dict[str, int] = {}

    def call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        """Make one call of MLflow's client, in its turn."""
        self.turns.wait()
        self.turns.clock += CALL
        driver = threading.current_thread().name
        self.calls[driver] = self.calls.get(driver, 0) + 1
        if driver in self.kill_at and self.calls[driver] >= self.kill_at[driver]:
            raise Killed
        if method == "set_registered_model_alias" and arguments[1] == CHAMPION:
            self.note_move(driver, str(arguments[2]))
        return getattr(self.real, method)(*arguments)

    def note_move(self, driver: str, to: str) -> None:
        """Check a move of the champion at the moment when it is made."""
        there = self.real.get_registered_model(self.aliases.name).aliases
        before = str(there[CHAMPION])
        if driver.startswith("gate"):
            self.tally.promoted += 1
            self.tally.stale += self.against[driver] != before
            self.tally.against_hand += to in self.back or (to == "4" and "2" in self.back)
        elif driver == "promote":
            self.tally.by_hand += 1
            self.back.discard(to)
        else:
            self.tally.rolled_back += 1
            self.back.add(before)
        previous = None if driver == "rollback" else self.expected[-1][1] if before == to else before
        self.expected.append((to, previous))

    def gate(self, number: str) -> Callable[[], None]:
        """Judge version `number` as a retraining does; called again until it has decided."""

        def decide(challenger: Version, champion: Version | None) -> Decision:
            driver = threading.current_thread().name
            assert champion is not None
            self.tally.again += driver in self.against
            self.against[driver] = champion.number
            for _ in range(self.random.randrange(12)):  # a long training
                self.turns.wait()
            passed = self.loss[challenger.number] < self.loss[champion.number]
            return Decision(passed, "by its loss", {})

        return lambda: self.until_done(lambda: apply_decision(self.aliases, number, decide, lambda: None))

    def until_done(self, act: Callable[[], object]) -> None:
        """Repeat the call after it was killed; an error for users ends it."""
        driver = threading.current_thread().name
        while True:
            try:
                act()
            except Killed:
                self.tally.killed += 1
                del self.kill_at[driver]
                continue
            except UserError as error:
                if error.exit_code != 2:
                    continue
            return

    def play(self) -> None:
        """Play the game and check the final state."""
        drivers: dict[str, Callable[[], None]] = {
            "gate 3": self.gate("3"),
            "gate 4": self.gate("4"),
            "rollback": lambda: self.until_done(lambda: self.aliases.rollback("bad answers")),
            "promote": lambda: self.until_done(lambda: self.aliases.promote("5", "promoted by hand")),
        }
        chosen = dict(self.random.sample(sorted(drivers.items()), self.random.choice([2, 3, 4])))
        if self.random.random() < 0.4:
            self.kill_at[self.random.choice(sorted(chosen))] = self.random.randrange(1, 30)
        self.turns.play(chosen)
        self.aliases.repair()
        self.tally.interleavings += 1
        self.tally.refused += sum(v.tags.get(GATE, "").startswith("refused") for v in self.aliases.versions())
        self.tally.inconsistent += self.problems()

    def problems(self) -> Iterator[str]:
        """Return the errors of the final state."""
        found = self.real.get_registered_model(self.aliases.name)
        there = self.aliases.current()
        state = there.get(CHAMPION), there.get(PREVIOUS)
        if state != self.expected[-1]:
            yield f"champion and previous are {state}, and should be {self.expected[-1]}"
        if any(tag.startswith(LOCK) for tag in found.tags):
            yield f"tags are left: {found.tags}"
        for version in self.aliases.versions():
            gate = version.tags.get(GATE, "")
            if version.number == state[0] and MOVE in version.tags:
                yield f"the move to version {version.number} is not completed"
            if version.number == state[0] and version.number != "2" and gate.startswith(("refused", ROLLED_BACK)):
                yield f"version {version.number} is the champion, and its tag says {gate!r}"
            if version.number in self.back and not gate.startswith(ROLLED_BACK):
                yield f"version {version.number} was rolled back, and its tag says {gate!r}"

    def reset(self) -> None:
        """Set the state with which each interleaving starts."""
        name = self.aliases.name
        for alias in self.aliases.current():
            self.real.delete_registered_model_alias(name, alias)
        for version in self.aliases.versions():
            if GATE in version.tags:
                self.real.delete_model_version_tag(name, version.number, GATE)
        self.real.set_model_version_tag(name, "4", ORIGIN, "champion, version 2")
        self.real.set_registered_model_alias(name, CHAMPION, "2")
        self.real.set_registered_model_alias(name, PREVIOUS, "1")


class PlayedLock(RegistryLock):
    """A lock that waits in turns and has their clock."""

    def now(self) -> float:
        return self.client.game.turns.clock

    def pause(self) -> None:
        self.client.game.turns.clock += PAUSE
        self.client.game.turns.wait()


class PlayedAliases(Aliases):
    """Aliases whose every call of MLflow waits for its turn."""

    lock = PlayedLock

    def __init__(self, aliases: Aliases, game: Game) -> None:
        super().__init__(aliases.uri, aliases.name)
        self.game = game

    @property
    def client(self) -> Any:
        return self

    def __getattr__(self, method: str) -> Any:
        return lambda *arguments, **named: self.game.call(method, arguments)
