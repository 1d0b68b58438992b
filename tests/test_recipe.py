"""The recipe against the paper's numbers (S.2, Sec. 4.2), and the arithmetic of positions and divisions."""

import itertools
import re

import pytest

import model
import recipe
from engine import errors


def test_the_2b_run_is_the_papers():
    plan = recipe.RECIPES["2b"]
    assert plan.begins() == [0, 500_000, 710_000]
    assert [(stage.sides, stage.batch_size) for stage in plan.stages] == [((256,), 1024), ((256, 512), 768)]
    assert plan.learning_rate(999) == pytest.approx(3e-4) and plan.learning_rate(0) == pytest.approx(3e-7)
    assert plan.learning_rate(710_000) == pytest.approx(1e-5)
    middle = plan.learning_rate(1000 + 354_500)
    assert middle == pytest.approx((3e-4 + 1e-5) / 2)
    assert plan.tau(0) == 0 and plan.tau(150_000) == pytest.approx(0.5) and plan.tau(300_000) == plan.tau(700_000) == 1
    assert [plan.aux(step) for step in (0, 549_999, 550_000, 709_999)] == [False, False, True, True]
    assert (plan.ema, plan.betas, plan.txt_len, plan.warmup) == (0.9999, (0.9, 0.95), 256, 1000)


def test_the_ablation_run():
    plan = recipe.RECIPES["0.5b"]
    assert plan.steps == 300_000 and [(s.sides, s.batch_size) for s in plan.stages] == [((256,), 1024)]
    assert plan.tau(150_000) == 0.5 and plan.tau(299_999) == pytest.approx(1, abs=1e-5) and not plan.aux(299_999)


def test_sides_take_turns_batch_by_batch():
    plan = recipe.RECIPES["2b"]
    assert {plan.side(step) for step in range(1000)} == {256}
    sides = [plan.side(500_000 + i) for i in range(100)]
    assert sides.count(256) == sides.count(512) == 50 and all(a != b for a, b in itertools.pairwise(sides))


def test_positions_never_repeat_and_start_stages_at_whole_batches():
    plan = recipe.make("2b", steps=50)  # stages of 35 and 15 iterations: 35 * 1024 is no multiple of 768
    spans = [(plan.first(step), plan.first(step) + plan.stage(step).batch_size) for step in range(50)]
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert all(begin % plan.stage(step).batch_size == 0 for step, (begin, _) in enumerate(spans))
    assert spans[35][0] - spans[34][1] < 768


def test_short_runs_keep_the_papers_proportions():
    plan = recipe.make("2b", steps=710)
    assert plan.begins() == [0, 500, 710] and plan.tau(300) == 1 > plan.tau(299) and plan.aux(550) and not plan.aux(549)
    assert plan.learning_rate(35) == pytest.approx(3e-4)  # the warm-up is at most 5% of the run


def test_changes_of_side_and_batch_merge_stages_that_become_alike():
    plan = recipe.make("2b", side=256, batch_size=512)
    assert [(stage.sides, stage.batch_size) for stage in plan.stages] == [((256,), 512)]
    assert len(recipe.make("2b",
                           batch_size=512).stages) == 2 and recipe.make("2b").stages == recipe.RECIPES["2b"].stages


@pytest.mark.parametrize("size, world, micro, batch",
                         [("2b", 7, 16, None), ("2b", 8, 24, None), ("2b", 48, 8, None), ("0.5b", 12, 64, None),
                                                       ("laptop", 3, 4, 32), ("laptop", 5, None, 32),
                                                       ("2b", 6, 10, 100)])  # fmt: skip
def test_refusals_name_combinations_that_divide(size, world, micro, batch):
    plan = recipe.make(size, micro_batch=micro, batch_size=batch)
    with pytest.raises(errors.UserError) as refused:
        plan.check_division(world, micro)
    told = str(refused.value)
    assert "the nearest that do" in told and "\n" not in told
    ways = told.split("the nearest that do: ")[1].split("; ")
    tried = 0
    for way in ways:
        numbers = [int(n) for n in re.findall(r"\d+", way)]
        if "processes with" in way:
            *worlds, m = numbers
            combinations = [(w, m, batch) for w in worlds]
        elif "on" in way.split():
            *micros, w = numbers
            combinations = [(w, m, batch) for m in micros]
        else:
            combinations = [(world, micro, b) for b in numbers]
        for w, m, b in combinations:
            recipe.make(size, micro_batch=m, batch_size=b).check_division(w, m)
            tried += 1
    assert tried


@pytest.mark.parametrize("world, batch", [(1, 32), (2, 36), (3, 20)])
def test_refusals_for_groups_of_four_name_what_divides(world, batch):
    """IMM's micro-batches are multiples of 4: a batch for micro-batches of 6 does not exist."""
    plan = recipe.make("laptop", batch_size=batch, group=4)
    with pytest.raises(errors.UserError) as refused:
        plan.check_division(world, 6)
    *batches, micro = map(int, re.findall(r"\d+", str(refused.value).split("--batch-size")[1]))
    for near in batches:
        recipe.make("laptop", batch_size=near, group=4).check_division(world, micro)
    assert batches and "with micro-batches" in str(refused.value)


@pytest.mark.parametrize("world", [1, 8, 16, 32, 64])
def test_the_2b_batch_divides_over_the_usual_numbers_of_gpus(world):
    plan = recipe.RECIPES["2b"]
    plan.check_division(world)
    for stage in plan.stages:
        for side in stage.sides:
            micro = plan.micro_batch_of(stage, side, world)
            assert stage.batch_size % (world * micro) == 0 and micro % 2 == 0 and micro * side**2 <= max(16 * 256**2,
                                                                                                         2 * side**2)


def test_the_price_of_the_paper():
    """The design notes' estimate: about 4.7e21 FLOP and 3,300 H100-hours at 40% for the whole run."""
    assert recipe.run_flops(model.SIZES["2b"], recipe.RECIPES["2b"], "self_e", 8) == pytest.approx(4.7e21, rel=0.05)
    whole = recipe.run_flops(model.SIZES["2b"], recipe.RECIPES["2b"], "self_e", 8)
    rest = recipe.run_flops(model.SIZES["2b"], recipe.RECIPES["2b"], "self_e", 8, start=600_000)
    by_hand = 110_000 * 768 * 5.5 * (model.forward_flops(model.SIZES["2b"], 256, 256)
                                     + model.forward_flops(model.SIZES["2b"], 1024, 256)) / 2
    assert rest == pytest.approx(by_hand) and rest < whole
    assert recipe.run_flops(model.SIZES["2b"], recipe.make("2b", aux_from=1.0), "flow_matching", 8) < 0.75 * whole


def test_state_of_the_2b_model_fits():
    """fp32 weights, gradients, Adam's moments and the average: under 42 GiB, and ZeRO-1 spreads the moments."""
    parameters = 2_247_720_000
    assert sum(recipe.state_bytes(parameters, 1, False).values()) / 2**30 < 42
    assert sum(recipe.state_bytes(parameters, 8, True).values()) / 2**30 < 28
