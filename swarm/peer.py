"""A peer for scripts, notebooks and the command line: enter a run, hold blocks, train, generate, export.

Synchronous; the network runs on a loop in its own thread (loop.py). The parts are wired in node.py.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from blocks.checks import check_kind, check_number, check_whole
from blocks.spans import Span
from peers.address_book import save_addresses
from peers.config import NetworkConfig
from peers.network import PeerId
from peers.private.membership import Role
from swarm.arguments import as_path, check_names
from swarm.errors import BadConfig, BadJoinString
from swarm.join_string import MAX_BOOTSTRAP, Join, Known, RunDirectory, known_of, own_state, save_join
from swarm.loop import LEFT, LoopThread
from swarm.node import BOOK_NAME, Node, NodeConfig
from swarm.peer_config import PeerConfig
from swarm.private.entry import Search, find_entry
from swarm.reports.status import Status, look
from swarm.run import RunId
from swarm.state import StateDirectory, claim_state, lock_state

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from blocks.shared_client import SharedClient
    from swarm.data.stream import SampleSet
    from swarm.hosts.loading import HostingConfig
    from swarm.model import SwarmModel
    from swarm.training.jobs import TrainingResult
    from swarm.training.trainer import Progress

logger = logging.getLogger(__name__)

ENTERING = threading.RLock()
"""One peer of this process after the other: uvloop cannot start processes for two loops at once."""
T = TypeVar("T")


class Peer:
    """One peer of a run, from `enter` to `close`; a context manager."""

    def __init__(self, loop: LoopThread, node: Node, state: StateDirectory, config: PeerConfig) -> None:
        self.node, self.config = node, config
        self.loop = loop
        self._state = state
        self._lock = threading.Lock()
        self.ends: SharedClient | None = None
        """Embedding, norm and head, once there is a model. Peers whose runs have one base model may share it."""
        self._closed = False

    @classmethod
    def enter(cls, target: Join | RunDirectory, config: PeerConfig) -> Peer:
        """Enter the run named by a join string or a run directory.

        Raises:
            SwarmError, PeerError: the run, its state or the network cannot be used, or this peer is not invited.
        """
        check_kind(BadJoinString, "target", target, (Join, RunDirectory), "swarm.join(...), which takes all names")
        check_kind(BadConfig, "config", config, PeerConfig, "swarm.PeerConfig(...)")
        with ENTERING:
            return _enter(cls, target, config)

    @property
    def id(self) -> PeerId:
        """This peer's id: the hash of its public key."""
        return self.node.network.peer_id

    @property
    def join(self) -> Join:
        """What others need to enter this run through this peer, or through whom this peer entered."""
        own = self.loop.run(self.node.network.addresses())
        known = tuple(dict.fromkeys([*own, *self.node.config.network.bootstrap]))[:MAX_BOOTSTRAP]
        return Join(run_id=self.node.config.run, run_name=self.node.spec.name, peers=known)

    @property
    def holds_all(self) -> bool:
        """Whether this peer holds every block, so that its own work never leaves it."""
        return self.node.hosting is not None and self.node.hosting.host.span == self.node.whole

    def hold(self, span: Span | None, config: HostingConfig) -> Span:
        """Hold blocks from now on; `span` None is what the swarm lacks most. Returns what is held.

        Raises:
            BlockError, SwarmError: the model or the span does not fit.
        """
        from swarm.hosts.loading import HostingConfig

        check_kind(BadConfig, "span", span, (Span, type(None)), "swarm.Span(start, end), or None: what is lacking most")
        check_kind(BadConfig, "config", config, HostingConfig, "swarm.HostingConfig(...)")
        hosting = self.loop.run(self.node.host(replace(config, span=span)))
        return hosting.host.span

    def load(self, data: object, *, labels: Sequence[str] = ()) -> SampleSet:
        """Read data as samples of the run's sequence length: one source of data.load_samples, a list of some, or rows.
        Of held-out rows with a label, `labels` are some that may be chosen besides those that the rows have.

        Raises:
            BadData: a source or a row cannot be used; the message names it.
        """
        from swarm.data.stream import load_samples

        check_names("labels", labels)
        is_list = isinstance(data, (list, tuple)) and not (data and isinstance(data[0], Mapping))
        sources = list(data) if is_list else [data]  # type: ignore[call-overload]
        return load_samples(sources, self.tokenizer(), self.node.spec.training.sequence_length, labels)

    def train(
        self,
        data: object,
        *,
        steps: int = 0,
        held_out: SampleSet | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        last_round: int = 0,
    ) -> TrainingResult:
        """Bring data, a SampleSet or what `load` takes: `steps` batches (0: as many as are missing to the
        run's `total_samples` now, be it none).

        `held_out` is measured before the first step, after every round, and at the end, when `last_round` is done. Its
        sums are told to the swarm, and added to those of all other trainers that measure.

        Raises:
            BadData: nothing can be chosen among the labels of `held_out`.
            NoRoute: some blocks have no live holder, for longer than `route_seconds`.
            NotInvited: to this private run, but not as a trainer.
            BadConfig: an argument is of the wrong kind or out of range; the message names it.
        """
        from swarm.data.stream import SampleSet
        from swarm.training.jobs import TrainingRequest, train

        samples = data if isinstance(data, SampleSet) else self.load(data)
        request = TrainingRequest(
            data=samples, steps=steps, held_out=held_out, on_progress=on_progress, last_round=last_round
        )
        return self.loop.run(train(self.node, self.config, request))

    def model(self, *, tokenizer: PreTrainedTokenizerBase | None = None, adapter: str | None = None) -> SwarmModel:
        """The run's model with `generate` and `chat`, its blocks in the swarm; from one thread at a time. Several share
        what this peer has of it. `tokenizer` is used instead of another one, `adapter` names a published adapter to use
        instead of the run's own: BadConfig where there is none of that name.
        """
        from swarm.adapters.finding import find_adapter
        from swarm.training.jobs import build_model, client_ends

        if self._closed:
            raise BadConfig(LEFT)
        published = None if adapter is None else self.loop.run(find_adapter(self.node, adapter))
        with self._lock:
            self.ends = self.ends or client_ends(self.node, self.config)
        return build_model(self.node, self.config, self.ends, self.loop.loop, tokenizer, published)

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        adapter: bool | str = True,
        lookup: bool = True,
        draft: str | None = None,
    ) -> str:
        """What the model says after `prompt`; `model()` has the rest: chat, several texts together, streaming.

        Tokens are guessed ahead from the text so far unless `lookup` is False, or by a small model on this machine
        with the name or path `draft`; the chain verifies them. `adapter` may name a published one, or be False: none.

        Raises:
            NoRoute: some blocks have no live holder, for longer than `route_seconds`.
            BlockError: the draft model cannot be used, or the text would be longer than the model takes.
            BadConfig: an argument is of the wrong kind or out of range; the message names it.
        """
        from swarm.model import Sampling

        check_kind(BadConfig, "prompt", prompt, str, "a string; model().generate() continues several together")
        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature)
        model = self.model(adapter=adapter if isinstance(adapter, str) else None)
        speculation = model.speculation(draft, lookup, self.config.cache_dir)
        return model.generate(prompt, sampling, adapter=bool(adapter), speculation=speculation)[0]

    def export(self, directory: str | Path) -> int:
        """Write the adapter of the newest complete state as a peft directory; returns its round.

        Raises:
            NoRoute: some block's adapter is held by nobody who answers.
            BadAdapter: the directory cannot take it.
            BadConfig: it is no path.
        """
        from swarm.exporting import export

        return self.loop.run(export(self.node, self.config, as_path("directory", directory)))

    def wait_for_round(self, number: int, *, seconds: float) -> bool:
        """Until every block's holders announce round `number` or later; False when `seconds` have passed."""
        from swarm.training.jobs import wait_for_round

        check_whole(BadConfig, "number", number, 0)
        check_number(BadConfig, "seconds", seconds, 0)
        return self.loop.run(wait_for_round(self.node, number, seconds=seconds))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The run's tokenizer."""
        from blocks.load import load_tokenizer
        from swarm.run_model import find_run_model

        return load_tokenizer(find_run_model(self.node.spec, self.config.model, self.config.cache_dir))

    def status(self) -> Status:
        """Who holds what, how far the run is, who trains."""
        return self.loop.run(look(self.node))

    def run(self, work: Coroutine[object, object, T]) -> T:
        """The result of something that is asked of the node, on its loop; see the functions that take a Node."""
        return self.loop.run(work)

    def watch(self, show: Callable[[str], None], *, seconds: float) -> None:
        """Say every `seconds` how this host stands, until interrupted; a failure of one of its tasks is raised."""
        check_number(BadConfig, "seconds", seconds, 0)
        while True:
            show(self.node.line())
            self.loop.run(self.node.wait(seconds))

    def close(self) -> None:
        """Leave the run: keep the state, end every process and thread of this peer. Safe to call twice."""
        if not self._closed:
            self._closed = True
            try:
                self.loop.run(self.node.stop())
            finally:
                self.loop.close()
                self._state.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _enter(cls: type[Peer], target: Join | RunDirectory, config: PeerConfig) -> Peer:
    known = known_of(target)
    network = _with_bootstrap(config.network, known, target)
    search = Search(target=target, run=known.run, state_root=config.state_root, state=config.state)
    entry = find_entry(search, Role.CLIENT if network.client_mode else Role.HOST)
    state = _claim(target, config, known.run)
    loop = LoopThread()
    try:
        if known.peers and not network.bootstrap:
            save_addresses(state.path / BOOK_NAME, known.peers)
        node_config = NodeConfig(
            run=known.run,
            network=network,
            state=state.path,
            run_blob=known.blob,
            rules=config.rules,
            route_seconds=config.route_seconds,
            max_send=config.max_send,
            lan=config.lan,
            private=None if entry is None else entry.begin(state.path),
        )
        peer = cls(loop, loop.run(Node.start(node_config)), state, config)
        if isinstance(target, RunDirectory) and not network.client_mode:
            save_join(target.path, peer.join)
    except BaseException:
        loop.close()
        state.close()
        raise
    return peer


def _claim(target: Join | RunDirectory, config: PeerConfig, run: RunId) -> StateDirectory:
    """The chosen directory; else the target directory's own where it is free; else the first free one."""
    if config.state is not None:
        return lock_state(config.state)
    if isinstance(target, RunDirectory) and not config.network.client_mode:
        try:
            return lock_state(own_state(target))
        except BadConfig as error:
            logger.debug("%s", error)  # a second peer from the same directory gets a state of its own
    return claim_state(config.state_root, run)


def _with_bootstrap(network: NetworkConfig, known: Known, target: Join | RunDirectory) -> NetworkConfig:
    """Known peers must answer, unless a host has the signed settings: it may be the first, or the first one back.

    Raises:
        BadJoinString: trainers and clients need somebody to start from, and nobody is known.
    """
    if network.client_mode or known.blob is None:
        network = replace(network, bootstrap=tuple(dict.fromkeys([*network.bootstrap, *known.peers])))
    if network.client_mode and not network.bootstrap:
        where = target.path if isinstance(target, RunDirectory) else target.run_name
        raise BadJoinString(f"no peer of this run is known yet; start its first one with `swarm join {where}`")
    return network
