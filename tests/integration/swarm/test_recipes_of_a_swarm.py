"""Whole swarms whose swarm.toml asks for other rules of rounds: all holders agree, and what was agreed survives."""

from __future__ import annotations

import pytest
import torch

from blocks.adapters import parameters_by_unit, read_units
from peers.errors import PeerError
from swarm.errors import BadConfig
from swarm.hosts.loading import HostingConfig
from tests.integration.swarm.conftest import MakeSwarm
from tests.integration.swarm.small_swarm import BACK, CACHE_BYTES, FRONT, WHOLE, host_of
from tests.integration.swarm.test_rounds_of_a_swarm import SETTINGS, agree, digests, train_one_round, two_rounds


def settings_with(**rules: object) -> dict[str, dict[str, object]]:
    return {**SETTINGS, "rounds": {**SETTINGS["rounds"], **rules}}


@pytest.mark.parametrize(
    "rules",
    [
        {"outer": "nesterov", "codec": "int8", "lossless": True},
        {"local": "scaffold", "weighting": "tokens"},
        {"merging": "rolora", "local": "fedprox", "codec": "fp16"},
        {"merging": "ffa", "local": "fednova"},
        {"overlap": True, "codec": "topk", "top_share": 0.2},
        {"merging": "power"},
        {"moments": "mean", "outer": "nesterov", "codec": "int8"},
    ],
    ids=lambda rules: "-".join(str(value) for value in rules.values()),
)
def test_all_holders_are_equal_after_rounds_by_the_runs_rules(make_swarm: MakeSwarm, rules: dict[str, object]) -> None:
    swarm = make_swarm(settings_with(**rules))
    hosts = swarm.hosts(a=FRONT, b=BACK, c=WHOLE)
    for number in two_rounds(swarm, hosts):
        assert all(state.round == number for host in hosts for state in host_of(host).units.values())
    _check_rule(rules, host_of(hosts[0]).units.values())


def _check_rule(rules: dict[str, object], states) -> None:
    for state in states:
        kinds = {name.partition("/")[0] for name in state.outer}
        if rules.get("outer") == "nesterov":
            assert kinds == {"velocity"}
        if rules.get("local") == "scaffold":
            assert kinds == {"control"}
            assert any(bool(tensor.any()) for tensor in state.outer.values())
        if rules.get("merging") == "power":
            assert kinds == {"basis"}


def test_ffa_trains_b_alone_and_rolora_one_half_at_a_time(make_swarm: MakeSwarm) -> None:
    for merging, moved_in in (("ffa", ({"lora_B"}, {"lora_B"})), ("rolora", ({"lora_B"}, {"lora_A"}))):
        swarm = make_swarm(settings_with(merging=merging))
        hosts = swarm.hosts(a=FRONT, b=BACK)
        trainer = swarm.enter("trainer")
        for moved in moved_in:
            before = {unit: dict(state.tensors) for unit, state in host_of(hosts[0]).units.items()}
            train_one_round(swarm, trainer, hosts)
            changed = {
                name.rpartition(".")[2]
                for unit, state in host_of(hosts[0]).units.items()
                for name, tensor in state.tensors.items()
                if not torch.equal(tensor, before[unit][name])
            }
            assert changed == moved, merging


def test_what_holders_agree_on_besides_the_adapter_reaches_newcomers_and_survives_a_restart(
    make_swarm: MakeSwarm,
) -> None:
    swarm = make_swarm(settings_with(outer="nesterov"))
    hosts = swarm.hosts(a=FRONT, b=BACK)
    trainer = swarm.enter("trainer")
    number = train_one_round(swarm, trainer, hosts)
    newcomer = swarm.host("newcomer", WHOLE)
    for host in hosts:
        for unit, state in host_of(host).units.items():
            theirs = host_of(newcomer).units[unit].outer
            assert theirs.keys() == state.outer.keys() != set()
            assert all(torch.equal(tensor, theirs[name]) for name, tensor in state.outer.items())
    before = digests(newcomer)
    swarm.stop("newcomer")
    again = swarm.host("newcomer", WHOLE)
    assert host_of(again).round == number
    assert digests(again) == before
    hosts.append(again)
    train_one_round(swarm, trainer, hosts)
    assert agree(*hosts)


def test_power_lets_a_weak_peer_train_a_smaller_rank_and_all_serve_the_same(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(settings_with(merging="power"))
    strong = swarm.host("strong", WHOLE)
    weak = swarm.enter("weak")
    weak.hold(WHOLE, HostingConfig(cache_dir=swarm.cache_dir, num_threads=1, cache_bytes=CACHE_BYTES, lora_rank=3))
    hosts = [strong, weak]
    trainer = swarm.enter("trainer")
    for _ in range(2):
        train_one_round(swarm, trainer, hosts)
        assert agree(*hosts)
    trained = parameters_by_unit(host_of(weak).model)
    served = read_units(host_of(weak).model, host_of(weak).shelf.newest.label)
    for unit, named in trained.items():
        for name, parameter in named.items():
            rank = 0 if name.endswith("lora_A") else 1
            assert parameter.shape[rank] == 3
            assert served[unit][name].shape[rank] == 8


def test_a_smaller_rank_is_refused_where_the_rule_forbids_it(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(SETTINGS)
    weak = swarm.enter("weak")
    config = HostingConfig(cache_dir=swarm.cache_dir, num_threads=1, cache_bytes=CACHE_BYTES, lora_rank=3)
    with pytest.raises((BadConfig, PeerError), match=r"rank 3 is not the run's 8.*leave --lora-rank out"):
        weak.hold(WHOLE, config)
