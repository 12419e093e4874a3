"""One long run of a swarm under a storm of faults; what it answers is in examples/soak.py."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from parts.chaos_hosts import is_running
from parts.chaos_swarm import BATCH, SETTINGS, ChaosSwarm, run_in, tiny_layout
from parts.churn_course import bring_back
from parts.faults import STARTS_AGAIN, Fault, FaultKind, storm
from parts.report import Values, say
from parts.soak_watch import Ages, RoundWatch, TrainerWatch, Usage, usage
from parts.tiny_model import BACK, FRONT, save_counting_rows, save_tiny_model

from peers.errors import PeerError
from swarm.errors import SwarmError
from swarm.join_string import format_join
from swarm.training.trainer import STATE_NAME

TRAINER_TURN = 12  # every so many faults the trainer is killed instead of a host being struck
LASTING_SECONDS = (2.0, 8.0)
WARM_SECONDS = 20.0
_LOOK_SECONDS, _TELL_SECONDS, _WEIGH_SECONDS = 0.5, 10.0, 30.0
_END_SECONDS = 20.0
_NEVER = 10**6  # steps of the trainer: it is ended from outside


@dataclass(frozen=True, kw_only=True, slots=True)
class SoakPlan:
    """How long, how many hosts, and from which seed the faults come, one every `every_seconds`."""

    root: Path
    seconds: float
    seed: int
    num_peers: int
    every_seconds: float


class Soak:
    """`run` once."""

    def __init__(self, plan: SoakPlan) -> None:
        self.plan = plan
        spans = {f"host-{number}": (FRONT, BACK)[number % 2] for number in range(plan.num_peers)}
        settings = {**SETTINGS, "rounds": {"round_samples": 8 * BATCH, "round_seconds": 5.0}}
        model = save_tiny_model(plan.root / "model")
        self.swarm = ChaosSwarm(plan.root / "swarm", tiny_layout(plan.root, model, spans=spans, settings=settings))
        self.data = save_counting_rows(plan.root / "rows.jsonl", 64)
        self.state = plan.root / "trainer"
        self.watch = TrainerWatch(self.state / STATE_NAME)
        self.rounds, self.ages = RoundWatch(), Ages()
        self.struck: Counter[str] = Counter()
        self.died: list[str] = []
        self.failed_starts: list[str] = []
        self.skipped = 0
        self._dice = random.Random(plan.seed)
        self._busy: dict[str, tuple[Fault, float]] = {}  # what a host suffers, and until when
        self._trainer: subprocess.Popen[bytes] | None = None
        self._killed_trainer = False
        self._began = self._over_at = time.monotonic()

    def run(self) -> Values:
        """Until its seconds have passed or a signal comes; every process has ended when this returns."""
        before = after = Usage(megabytes=0, files=0, processes=0)
        checked: Values = {"stopped_early": True}
        try:
            self._start()
            before = self._usage()
            self._storm()
            self._over_at = time.monotonic()
            self.swarm.settled()
            bring_back(self.swarm)
            after = self._usage()
            checked = self._check()
        except KeyboardInterrupt:
            self._over_at = time.monotonic()
            say("stopped; ending all processes")
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is started must end, however often one asks
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self._end_trainer()
            self.swarm.close()
        left = self._left_behind()
        found = {**self._told(), **checked, "left_behind": len(left)}
        for key in ("megabytes", "files", "processes"):
            found[key] = [getattr(before, key), getattr(after, key)]
        found["growth"] = self.ages.rows()[:8]
        found["nothing_lost"] = not left and self._is_whole(checked)
        return found

    def _start(self) -> None:
        say(f"starting {self.plan.num_peers} hosts and a trainer")
        self.swarm.start_all()
        self._start_trainer()
        while self.watch.step < 2:
            self._look()
            time.sleep(_LOOK_SECONDS)
        self.watch.gaps.clear()  # its start is no loss

    def _storm(self) -> None:
        self._began = time.monotonic()
        faults = storm(
            self.plan.seed,
            self.swarm.layout.groups(),
            every_seconds=self.plan.every_seconds,
            lasting_seconds=LASTING_SECONDS,
        )
        due, told_at, weighed_at = next(faults), 0.0, 0.0
        while (seconds := time.monotonic() - self._began) < self.plan.seconds:
            if seconds >= due.at:
                self._strike(due)
                due = next(faults)
            self._look()
            if seconds - weighed_at >= _WEIGH_SECONDS:
                weighed_at = seconds
                self._weigh()
            if seconds - told_at >= _TELL_SECONDS:
                told_at = seconds
                self._note_rounds()
                self._say(seconds)
            time.sleep(_LOOK_SECONDS)

    def _strike(self, fault: Fault) -> None:
        """This fault, at another host where its own is not whole or is the last of its group; or the trainer's turn."""
        if self.struck.total() % TRAINER_TURN == TRAINER_TURN - 1:
            self._kill_trainer()
            return
        free = self._free()
        parted = any(other.kind is FaultKind.PARTITION for other, _ in self._busy.values())
        if not free or (parted and fault.kind is FaultKind.PARTITION):  # a second partition would replace the first
            self.skipped += 1
            return
        if fault.name not in free:
            fault = replace(fault, name=self._dice.choice(free))
        assert fault.seconds is not None
        self._busy[fault.name] = fault, time.monotonic() + fault.seconds
        self.swarm.strike(fault)
        self.struck[fault.kind] += 1

    def _free(self) -> list[str]:
        """Whole hosts whose group has another one."""
        whole = {name for name in self.swarm.layout.spans if name not in self._busy and self.swarm.is_ready(name)}
        groups = self.swarm.layout.groups().values()
        return [name for names in groups for name in names if name in whole and len(whole.intersection(names)) > 1]

    def _look(self) -> None:
        """At whoever may have ended or come back, and at the trainer's steps."""
        moment = time.monotonic()
        self.watch.look(moment)
        over = [name for name, (_, end) in self._busy.items() if moment > end and self.swarm.is_ready(name)]
        for name in over:
            del self._busy[name]
        while self.swarm.later.errors:
            error = self.swarm.later.errors.pop()
            if not isinstance(error, SwarmError):
                raise error
            self.failed_starts.append(str(error)[-400:])
            for name, (fault, _) in list(self._busy.items()):
                if fault.kind in STARTS_AGAIN and not self.swarm.is_alive(name):
                    self._restart(name)
        for name in self.swarm.layout.spans:
            fault = self._busy[name][0] if name in self._busy else None
            if not self.swarm.is_alive(name) and (fault is None or fault.kind not in STARTS_AGAIN):
                self.died.append(f"{name} under {fault.kind if fault else 'nothing'}: {self.swarm.hosts[name].tail()}")
                self._restart(name)
        if self._trainer is not None and self._trainer.poll() is not None:
            if not self._killed_trainer:
                self.died.append(f"trainer with status {self._trainer.returncode}")
            self._start_trainer()

    def _restart(self, name: str) -> None:
        """A host that is gone although no fault will bring it back."""
        fault = Fault(kind=FaultKind.KILL, name=name, at=0, seconds=0)
        self._busy[name] = fault, time.monotonic()
        self.swarm.later.add(0, lambda: self.swarm.undo(fault))

    def _start_trainer(self) -> None:
        join = self.swarm.join
        if join is None:
            return
        self._killed_trainer = False
        arguments = ("--data", str(self.data), "--state", str(self.state), "--threads", "1", "--steps", str(_NEVER))
        self._trainer = self.swarm.command("train", format_join(join), *arguments)

    def _kill_trainer(self) -> None:
        if self._trainer is not None and self._trainer.poll() is None:
            self._killed_trainer = True
            self._trainer.kill()
            self.struck["trainer killed"] += 1

    def _end_trainer(self) -> None:
        if self._trainer is None:
            return
        self._trainer.terminate()
        try:
            self._trainer.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._trainer.kill()
            self._trainer.wait()

    def _note_rounds(self) -> None:
        """The newest round that living holders tell, for blocks of which all are there."""
        node = self.swarm.eye.node
        try:
            records = run_in(self.swarm.eye, node.directory.find_progress(node.config.run, node.whole))
        except PeerError as error:
            say(f"records could not be read: {error}")
            return
        ready = {self.swarm.ids[name] for name in self.swarm.layout.spans if self.swarm.is_ready(name)}
        newest: dict[int, int] = {}
        for record in records:
            for block in record.span.blocks() if record.peer in ready else ():
                newest[block] = max(record.round, newest.get(block, 0))
        self.rounds.note(newest)

    def _weigh(self) -> None:
        for name in self.swarm.alive:
            self.ages.note(self.swarm.hosts[name].pid, time.monotonic())

    def _usage(self) -> Usage:
        trainer = [] if self._trainer is None else [self._trainer.pid]
        return usage([*(self.swarm.hosts[name].pid for name in self.swarm.alive), *trainer])

    def _say(self, seconds: float) -> None:
        newest = max(self.rounds.newest.values(), default=0)
        now, lost = self._usage(), self.watch.lost_seconds(time.monotonic())
        say(
            f"{seconds:6.0f} s  {self.struck.total()} faults, round {newest}, {self.watch.samples} samples, "
            f"{lost:.0f} s lost, {len(self._free())} hosts whole, {now.megabytes:.0f} MB, "
            f"{now.files} files, {now.processes} processes",
            highlight=False,
        )

    def _check(self) -> Values:
        """When nothing happens any more: is everything there, and the same at all holders?"""
        self._end_trainer()
        number = self.swarm.wait_averaged()
        units = self.swarm.digests()
        newest = max(self.rounds.newest.values(), default=0)
        return {
            "rounds": number,
            "rounds_back": max(0, newest - number),
            "units_missing": sum(not holders for holders in units.values()),
            "units_equal": all(len(set(holders.values())) == 1 for holders in units.values()),
        }

    def _is_whole(self, checked: Values) -> bool:
        if "stopped_early" in checked:
            return not self.died
        lost = checked["rounds_back"] or checked["units_missing"] or self.watch.steps_back
        return bool(checked["units_equal"]) and not lost and not self.died

    def _told(self) -> Values:
        return {
            "seconds": round(self._over_at - self._began, 1),
            "seed": self.plan.seed,
            "faults_injected": self.struck.total(),
            "faults": dict(sorted(self.struck.items())),
            "faults_skipped": self.skipped,
            "samples": self.watch.samples,
            "steps": self.watch.step,
            "seconds_lost": round(self.watch.lost_seconds(self._over_at), 1),
            "longest_gap_seconds": round(max(self.watch.gaps, default=0.0), 1),
            "round_dips": self.rounds.back,
            "trainer_steps_back": self.watch.steps_back,
            "died": self.died,
            "failed_starts": self.failed_starts,
        }

    def _left_behind(self) -> list[int]:
        """Processes of ours that have not ended a while after all was ended."""
        deadline = time.monotonic() + _END_SECONDS
        while (left := [pid for pid in self.swarm.pids if is_running(pid)]) and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
        return left
