"""What each command does once its words are parsed: one function a command, showing what happens on a Screen."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from ipaddress import ip_address
from typing import TYPE_CHECKING

from blocks.spans import Span
from peers.config import NetworkConfig
from peers.errors import PeerError
from peers.network import PeerId
from peers.routes.routing import RouteRules
from swarm.data.rows import check_files
from swarm.errors import BadConfig, BadJoinString
from swarm.join_string import Join, RunDirectory, format_join, known_of, own_state, target_run_id
from swarm.options import (
    ExportOptions,
    GenerateOptions,
    InviteOptions,
    JoinOptions,
    PeerOptions,
    RevokeOptions,
    Screen,
    ServeOptions,
    StatusOptions,
    TrainOptions,
)
from swarm.peer import Peer
from swarm.peer_config import PeerConfig
from swarm.quick_start import import_hosting, settle
from swarm.reports.status import ADAPTER_COLUMNS, COLUMNS, GIVEN_COLUMNS, title
from swarm.reports.trackers import tracked
from swarm.reports.traffic import TRAFFIC_COLUMNS, size_words
from swarm.state import states_of
from swarm.training.view import TrainingView

if TYPE_CHECKING:
    from swarm.hosts.loading import HostingConfig

logger = logging.getLogger(__name__)

GATEWAY_PACKAGES = ("fastapi", "starlette", "uvicorn", "prometheus_client", "pydantic")
_STATUS_SECONDS = 2.0
_CLIENT_START_SECONDS = 10.0  # two hosts that start together wait for each other; clients come later


def run_join(options: JoinOptions, screen: Screen) -> None:
    """Hold blocks until stopped; says the join string on stdout."""
    network = NetworkConfig(host=options.host, port=options.port, announce=options.announce, bootstrap=options.peers)
    logger.info("network code is imported")
    importing = threading.Thread(target=import_hosting, name="imports", daemon=True)
    importing.start()  # what computes takes seconds to import, and p2pd a second to start: both at once
    screen.now("entering the swarm")
    config = replace(
        _config(options, network, model=options.model, nickname=options.nickname), max_send=options.max_send
    )
    with Peer.enter(options.target, config) as peer, ExitStack() as stack:
        importing.join()  # two threads that import the same modules from different ends could meet half-way
        stack.enter_context(tracked(peer, options.track))
        from swarm.hosts.loading import HostingConfig

        logger.info("model code is imported")
        screen.now(f"loading blocks of {peer.node.spec.model.name}")
        span = peer.hold(
            options.blocks,
            HostingConfig(
                cache_dir=options.cache_dir,
                device=options.device,
                dtype=options.dtype,
                quantize=options.quantize,
                cache_bytes=options.cache_megabytes << 20,
                num_threads=options.threads or None,
                nickname=options.nickname,
                model=options.model,
                lora_rank=options.lora_rank,
                keep_bytes=options.keep_megabytes << 20,
                resume=options.resume,
                max_blocks=options.max_blocks,
                max_memory_bytes=options.max_memory_bytes,
                hours=options.hours,
            ),
        )
        settle()
        screen.say(f"peer {peer.id} holds blocks {span} of {peer.node.spec.name}; {_others_join(options, peer)}:")
        screen.result(format_join(peer.join))
        peer.watch(screen.now, seconds=_STATUS_SECONDS)


def _others_join(options: JoinOptions, peer: Peer) -> str:
    if peer.node.network.gate is None:
        return "others join with"
    where = options.target.path if isinstance(options.target, RunDirectory) else "RUN"
    return f"it is private: the owner lets others in with `swarm invite {where} --for PEER_ID`. Who is in finds it by"


def run_invite(options: InviteOptions, screen: Screen) -> None:
    """One line that lets somebody into a private run."""
    from swarm.private.inviting import invite, until_words

    invitation = invite(options.directory, options.peer, options.role, days=options.days)
    grant = invitation.grant
    if grant.peer is None:
        screen.say(
            f"WHOEVER has this line can enter as {grant.role} until {until_words(grant)}: send it as you would a"
            f" password. End it with: swarm revoke {options.directory} {grant.serial.hex()}"
        )
    else:
        screen.say(
            f"for peer {grant.peer} alone, as {grant.role}, until {until_words(grant)}. "
            f"End it with: swarm revoke {options.directory} {grant.peer}"
        )
    screen.result(invitation.line)


def run_revoke(options: RevokeOptions, screen: Screen) -> None:
    """Put somebody on the owner's list, and give the list to the swarm."""
    from swarm.private.inviting import revoke

    number, words = revoke(options.target, options.who)
    screen.say(f"{words}; the list of those revoked has number {number}")
    screen.now("entering the swarm")
    try:
        with Peer.enter(options.target, _config(options, _client(options))) as peer:
            spread = peer.node.revocations is not None and peer.node.revocations.is_spread
    except (BadJoinString, PeerError) as error:
        logger.debug("the list was not brought to the swarm reason=%s", error)
        spread = False
    if spread:
        screen.say("the swarm has it; its peers refuse them within seconds")
    else:
        screen.say("no peer took it now; it is in the run's directory, and peers that start from there bring it along")


def run_train(options: TrainOptions, screen: Screen) -> None:
    """Bring data to a run."""
    check_files((*options.data, *options.eval_data))
    rules = RouteRules(
        avoid=frozenset(PeerId(peer) for peer in options.avoid),
        allow=frozenset(PeerId(peer) for peer in options.only) if options.only else None,
        keep_first=options.keep_first,
    )
    own = Span(0, options.keep_first) if options.keep_first else options.blocks
    is_dialled = own is not None and not options.behind_nat
    network = NetworkConfig(bootstrap=options.peers) if is_dialled else _client(options)
    screen.now("entering the swarm")
    config = replace(
        _config(options, network, model=options.model),
        rules=rules,
        route_seconds=options.wait_seconds,
        wire=options.wire,
    )
    with Peer.enter(options.target, config) as peer, tracked(peer, options.track):
        if own is not None:
            screen.now(f"loading blocks {own}")
            peer.hold(own, _hosting(options, options.device))
        screen.now("reading the data")
        data = peer.load(options.data)
        held_out = peer.load(options.eval_data, labels=options.labels) if options.eval_data else None
        seen = "and so do its activations" if peer.holds_all else "hosts see activations of it"
        screen.say(f"training on {len(data)} samples; their text stays here, {seen}")
        if data.num_cut:
            longest = peer.node.spec.training.sequence_length
            screen.say(f"{data.num_cut} rows were cut at {longest} tokens, the run's training.sequence_length")
        view = TrainingView(screen)
        result = peer.train(data, steps=options.steps, held_out=held_out, on_progress=view.show)
        view.finish(result.evaluations, result.swarm_evaluations)
        if not result.losses:
            total = peer.node.spec.training.total_samples
            screen.say(f"nothing is missing to the run's {total} samples; bring more with --steps")
            return
        screen.say(f"{len(result.losses)} steps, {result.tokens} tokens, last loss {result.losses[-1]:.4f}")
        used = peer.node.traffic.total
        screen.say(f"{size_words(used.sent)} sent, {size_words(used.received)} received")


def run_generate(options: GenerateOptions, screen: Screen) -> None:
    """Text from the run's model, as it is made."""
    network = _client(options)
    config = replace(
        _config(options, network, model=options.model), route_seconds=options.wait_seconds, wire=options.wire
    )
    screen.now("entering the swarm")
    with Peer.enter(options.target, config) as peer:
        from swarm.model import Sampling
        from swarm.text_stream import ScreenStreamer

        screen.now("loading the embedding and the head")
        model = peer.model(adapter=options.adapter if isinstance(options.adapter, str) else None)
        sampling = Sampling(
            max_new_tokens=options.max_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
        )
        if options.draft is not None:
            screen.now(f"loading the draft model {options.draft}")
        speculation = model.speculation(options.draft, options.lookup, options.cache_dir)
        streamer = ScreenStreamer(model.tokenizer, screen.stream)
        chat = model.tokenizer.chat_template is not None if options.chat is None else options.chat
        if chat:
            message = {"role": "user", "content": options.prompt}
            model.chat([message], sampling, adapter=bool(options.adapter), streamer=streamer, speculation=speculation)
        else:
            model.generate(
                options.prompt, sampling, adapter=bool(options.adapter), streamer=streamer, speculation=speculation
            )
        screen.stream("\n")


def run_serve(options: ServeOptions, screen: Screen) -> None:
    """Text over HTTP until stopped; says the address on stdout."""
    try:
        from swarm.gateway.serve import GatewayServer, gateway_config, listen, serve
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in GATEWAY_PACKAGES:
            raise
        raise BadConfig(f"{package} is not installed; run: pip install 'swarmtune[gateway]'") from error

    config = gateway_config(options)
    listening = listen(options.host, options.port)

    def enter(target: Join | RunDirectory) -> Peer:
        state = options.state
        if state is not None and options.others:
            state = state / known_of(target).run
        client = replace(
            _config(options, _client(options), model=options.model),
            route_seconds=options.wait_seconds,
            wire=options.wire,
            state=state,
        )
        return Peer.enter(target, client)

    def ready(server: GatewayServer) -> None:
        host, port = listening.getsockname()[:2]
        if config.keys is None and not ip_address(host).is_loopback:
            screen.say("no --api-keys: whoever reaches this address may use it")
        screen.say(f"models: {', '.join(server.gateway.catalog)}; a page, and the API under /v1, on:")
        screen.result(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    with ExitStack() as stack:
        first = options.target
        if options.local_hosts:
            from swarm.local_group import local_group

            screen.now(f"starting {options.local_hosts} hosts on this machine")
            group = stack.enter_context(local_group(first, options.local_hosts, options.cache_dir))
            first = group.target
            for host in group.hosts:
                screen.say(f"host process {host.pid} holds blocks {host.host.span}")
        screen.now("entering the swarm")
        serve([partial(enter, target) for target in (first, *options.others)], config, listening, ready)


def run_status(options: StatusOptions, screen: Screen) -> None:
    """Who holds what, once or again and again."""
    network = _client(options)
    with Peer.enter(options.target, _config(options, network)) as peer:
        while True:
            status = peer.status()
            if options.json:
                screen.data(status.to_plain())
            else:
                screen.table(title(status), COLUMNS, status.rows())
                if given := status.given_rows():
                    screen.table("since each peer's first start, as it says", GIVEN_COLUMNS, given, below=True)
                if status.catalogue.adapters:
                    screen.table("served beside it", ADAPTER_COLUMNS, status.adapter_rows(), below=True)
                if status.traffic:
                    screen.table("bytes since each host started", TRAFFIC_COLUMNS, status.traffic_rows(), below=True)
            if options.watch_seconds <= 0:
                return
            time.sleep(options.watch_seconds)


def run_export(options: ExportOptions, screen: Screen) -> None:
    """The newest adapter as a peft directory."""
    if options.left:
        _export_left(options, screen)
        return
    if options.best:
        _export_best(options, screen)
        return
    network = _client(options)
    screen.now("entering the swarm")
    with Peer.enter(options.target, _config(options, network, model=options.model)) as peer:
        screen.now("fetching the adapter of every block")
        number = peer.export(options.directory)
        screen.say(_exported_line(number, options))
        if number == 0:
            every = peer.node.spec.rounds.round_samples
            screen.say(f"no round was completed yet, so this adapter is untrained; one comes every {every} samples")


def _export_left(options: ExportOptions, screen: Screen) -> None:
    from swarm.exporting import LeftBehind, export_left

    screen.now("reading what peers have left")
    left = LeftBehind(target=options.target, directories=options.left, cache_dir=options.cache_dir, model=options.model)
    screen.say(_exported_line(export_left(left, options.directory), options))


def _export_best(options: ExportOptions, screen: Screen) -> None:
    from swarm.training.best_adapter import export_best

    run = target_run_id(options.target)
    states = [options.state] if options.state else states_of(options.state_root, run)
    if options.state is None and isinstance(options.target, RunDirectory):
        states.append(own_state(options.target))
    best = export_best(states, options.directory)
    rows = f" over the rows of {len(best.parts)} trainers" if len(best.parts) > 1 else ""
    screen.say(f"held-out loss {best.loss:.4f}{rows}, the lowest of trainers on this machine")
    screen.say(_exported_line(best.round, options))


def _exported_line(number: int, options: ExportOptions) -> str:
    return f"the adapter of round {number} is in {options.directory}; load it with PeftModel.from_pretrained"


def _hosting(options: TrainOptions, device: str) -> HostingConfig:
    from swarm.hosts.loading import HostingConfig

    return HostingConfig(
        cache_dir=options.cache_dir,
        device=device,
        quantize=options.quantize,
        num_threads=options.threads or None,
        model=options.model,
    )


def _client(options: PeerOptions) -> NetworkConfig:
    return NetworkConfig(bootstrap=options.peers, client_mode=True, start_seconds=_CLIENT_START_SECONDS)


def _config(
    options: PeerOptions,
    network: NetworkConfig,
    *,
    model: str | None = None,
    nickname: str = "",
) -> PeerConfig:
    return PeerConfig(
        state_root=options.state_root,
        cache_dir=options.cache_dir,
        state=options.state,
        network=network,
        num_threads=options.threads or None,
        model=model,
        nickname=nickname,
        lan=options.lan,
    )
