"""Whose keys, values and matrices a run uses: one notion, in the order in which depth notation writes it."""

from __future__ import annotations

from shoal.plan import Exit, Map, Parallel, Run, format_steps, parse_steps
from shoal.plan.notation import format_source
from shoal.plan.sources import KV, LayerKV, NewTensors
from shoal.plan.steps import key_source, layers_read, value_source, writes_kv


def test_a_run_names_its_sources_in_the_order_of_its_text() -> None:
    (run,) = parse_steps("13@12:new?g")
    assert isinstance(run, Run)
    assert run.sources == (LayerKV(12), NewTensors("new"))
    assert run.layer_sources == (LayerKV(12),)
    assert "13" + "".join(map(format_source, run.sources)) + "?g" == format_steps((run,))
    assert [str(source) for source in run.sources] == ["reads the KV of layer 12", "with the weights new"]
    assert key_source(run) == value_source(run) == 12 and not writes_kv(run)


def test_a_run_of_its_own_has_none() -> None:
    assert Run(3).sources == () and key_source(Run(3)) is None and writes_kv(Run(3))
    assert Run(3).plain and Run(3, "attention").plain
    assert not Run(3, gate="g").plain and not Run(3, weights="w").plain and not Run(3, kv=KV(1)).plain
    assert not Run(3, gate="g", kv=KV(fill="copy")).plain


def test_the_layers_that_are_read_are_found_in_groups_too() -> None:
    steps = (Run(0), Parallel((Run(1, kv=KV(0)), Run(2))), Run(3, kv=KV(2)), Map(4, 5, "m"), Exit("e"))
    assert layers_read(steps) == {0, 2}
    assert layers_read((Run(0), Map(1, 2, "m"))) == set()
