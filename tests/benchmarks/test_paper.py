"""The reproduction of the paper's figures: its systems, its loop, and that all of it runs."""

import dataclasses
import importlib.util
import json
import math

import pytest
from helpers import shared_dir
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.paper import __main__ as driver
from benchmarks.paper import beams, experiments, published, step_time, traces
from benchmarks.paper.baselines import FasterTransformer, Orca, reserved_tokens
from benchmarks.paper.experiments import device_setting, paper_setting, run, search
from benchmarks.paper.paged import Paged
from benchmarks.paper.simulation import System, Usage, simulate
from benchmarks.paper.step_time import Link, StepTime, StepWork
from benchmarks.paper.traces import Job, Trace, make_trace

SLOTS = 1024
STEP = StepTime(model=step_time.MODELS["opt-13b"], fixed_s=0.01, per_seq_s=0.001)
LENGTHS = st.tuples(st.integers(1, 60), st.integers(1, 60))


def make_paged(num_slots: int = SLOTS, **options) -> Paged:
    return Paged(num_slots, max_model_len=128, **options)


def make_systems(num_slots: int = SLOTS) -> dict[str, System]:
    orcas: dict[str, System] = {
        "pow2": Orca(num_slots, "pow2"),
        "oracle": Orca(num_slots, "oracle"),
    }
    return orcas | {"static": FasterTransformer(num_slots), "paged": make_paged(num_slots)}


def make_jobs(lengths: list[tuple[int, int]], gap_s: float = 0.0, **options) -> list[Job]:
    return [Job(i, i * gap_s, p, o, **options) for i, (p, o) in enumerate(lengths)]


class Checked:
    """Passes calls on and checks what every system owes after each of them."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.added: list[Job] = []
        self.done: list[Job] = []
        self.num_tokens = self.num_sampled = 0

    @property
    def num_running(self) -> int:
        return self.system.num_running

    @property
    def num_preemptions(self) -> int:
        return self.system.num_preemptions

    def add(self, job: Job) -> None:
        self.added.append(job)
        self.system.add(job)

    def start_step(self) -> StepWork | None:
        work = self.system.start_step()
        if work is not None:
            assert work.num_seqs > 0 or work.num_tokens > 0
            self.num_tokens += work.num_tokens
            self.num_sampled += work.num_seqs
            usage = self.usage()
            assert min(dataclasses.astuple(usage)) >= 0
            held = usage.tokens + usage.reserved + usage.internal
            assert held <= usage.allocated <= usage.total
        return work

    def end_step(self) -> list[Job]:
        done = self.system.end_step()
        self.done += done
        if isinstance(self.system, Orca):
            self.system.buddy.check_invariants()
        if isinstance(self.system, Paged):
            self.system.scheduler.check_invariants()
        return done

    def usage(self) -> Usage:
        return self.system.usage()


@pytest.mark.parametrize("name", make_systems())
@settings(max_examples=15, deadline=None)
@given(st.lists(LENGTHS, min_size=1, max_size=25), st.sampled_from([0.0, 0.05]), st.integers(1, 3))
def test_every_request_is_served_once_and_memory_is_given_back(name, lengths, gap_s, num_seqs):
    checked = Checked(make_systems()[name])
    num_seqs = 1 if name == "static" else num_seqs
    jobs = make_jobs(lengths, gap_s, num_seqs=num_seqs)
    outcome = simulate(checked, jobs, STEP, warmup_s=0.0)
    assert checked.added == jobs
    assert sorted(job.index for job in checked.done) == list(range(len(jobs)))
    usage = checked.usage()
    assert (usage.tokens, usage.reserved, usage.allocated) == (0, 0, 0)
    assert outcome.num_requests == len(jobs)
    if name in ("pow2", "oracle"):
        # The first token of a sequence comes from the prompt, which is computed once.
        outputs = [num_seqs * (o - 1) for _, o in lengths]
        assert checked.num_tokens == sum(outputs) + sum(p for p, _ in lengths)
        assert checked.num_sampled == sum(num_seqs * o for _, o in lengths)
    if name == "paged" and not outcome.num_preemptions:
        outputs = [num_seqs * (o - 1) for _, o in lengths]
        assert checked.num_tokens == sum(outputs) + sum(p for p, _ in lengths)


def test_orca_reserves_as_the_paper_says():
    job = Job(0, 0.0, prompt_tokens=100, output_tokens=25)
    assert reserved_tokens(job, "oracle") == 125
    assert reserved_tokens(job, "pow2") == 100 + 32
    assert reserved_tokens(job, "max") == traces.MAX_MODEL_LEN
    long = Job(0, 0.0, prompt_tokens=1000, output_tokens=1040)
    assert reserved_tokens(long, "pow2") == traces.MAX_MODEL_LEN
    with pytest.raises(ValueError, match=r"reservation must be one of .*, got 'min'"):
        Orca(SLOTS, "min")  # pyright: ignore[reportArgumentType]


def test_orca_max_runs_seven_requests_in_the_papers_memory():
    orca = Orca(step_time.MODELS["opt-13b"].num_slots, "max")
    for job in make_jobs([(10, 10)] * 20):
        orca.add(job)
    orca.start_step()
    assert orca.num_running == 7
    usage = orca.usage()
    assert usage.allocated == 7 * 2048
    assert (usage.tokens, usage.reserved, usage.internal) == (70, 70, 7 * 2048 - 140)


def test_a_static_batch_ends_with_its_longest_request():
    static = FasterTransformer(100)
    for job in make_jobs([(10, 2), (20, 5), (60, 30)]):
        static.add(job)
    work = static.start_step()
    # The third would need 3 * (60 + 30) slots. Prompts are padded to the longer one.
    assert work == StepWork(num_seqs=2, num_tokens=40, prompt_pairs=2 * 210)
    ended = [static.end_step()]
    while not ended[-1]:
        work = static.start_step()
        assert work is not None
        assert work.num_tokens == 2
        ended.append(static.end_step())
    assert [job.index for job in ended[-1]] == [0, 1]
    assert len(ended) == 5
    work = static.start_step()
    assert work is not None
    assert work.num_tokens == 60


def test_paging_holds_more_requests_than_reserving():
    jobs = make_jobs([(20, 50), (5, 4), (40, 60), (10, 20)] * 100, gap_s=0.05)
    step_time = dataclasses.replace(STEP, per_seq_s=0.0)
    outcomes = {
        name: simulate(system, jobs, step_time, warmup_s=0.0)
        for name, system in make_systems(2048).items()
    }
    batch = {name: outcome.mean_batch for name, outcome in outcomes.items()}
    latency = {name: outcome.normalized_latency_s for name, outcome in outcomes.items()}
    assert batch["paged"] > batch["oracle"] >= batch["pow2"] > 0
    assert latency["paged"] < latency["oracle"] <= latency["pow2"] < latency["static"]


def test_a_run_that_must_exceed_the_limit_is_cut():
    jobs = make_jobs([(20, 40)] * 400, gap_s=0.001)
    outcome = simulate(Orca(256, "oracle"), jobs, STEP, limit_s=0.5, warmup_s=0.0)
    assert outcome.is_overloaded
    assert math.isinf(outcome.normalized_latency_s)
    whole = simulate(Orca(256, "oracle"), jobs, STEP, warmup_s=0.0)
    assert whole.normalized_latency_s > 0.5
    assert not whole.is_overloaded


def test_step_time_is_the_stated_equation():
    model, device = STEP.model, STEP.device
    assert model.token_bytes == 819_200
    decode = StepWork(num_seqs=10, num_tokens=10, context_tokens=5000)
    weights_s = 26e9 / device.memory_bytes_s
    read_s = 5000 * 819_200 / device.memory_bytes_s
    assert STEP(decode) == pytest.approx(0.02 + weights_s + read_s)
    paged = dataclasses.replace(STEP, kernel=step_time.paper_kernel(16))
    assert paged(decode) - STEP(decode) == pytest.approx(0.23 * read_s)
    prompt = StepWork(num_seqs=1, num_tokens=1000, prompt_pairs=500_500)
    flops = 26e9 * 1000 + 4 * 40 * 5120 * 500_500
    assert STEP(prompt) == pytest.approx(0.011 + flops / device.flop_s)
    copied = dataclasses.replace(decode, copied_tokens=100, host_s=0.5)
    moved_s = 200 * 819_200 / device.memory_bytes_s
    assert STEP(copied) - STEP(decode) == pytest.approx(0.5 + moved_s)


def test_copies_to_the_host_cost_bytes_and_transfers():
    model, device = step_time.MODELS["opt-13b"], step_time.Device()
    bytes_s = 64 * model.token_bytes / device.link_bytes_s
    assert Link(model).copy_s(4, 16) == pytest.approx(bytes_s + 4 * 80 * device.transfer_s)
    assert Link(model, is_fused=True).copy_s(4, 16) == pytest.approx(bytes_s + device.transfer_s)


def test_calibration_is_a_least_squares_line_through_the_baselines_alone():
    fixed_s, per_seq_s = step_time.calibrate()
    points = step_time.calibration_points()
    assert len(points) == 6
    assert all(point.name.startswith("Orca") for point in points)
    rests = [p.implied_s - p.device_s - fixed_s - per_seq_s * p.num_seqs for p in points]
    assert sum(rests) == pytest.approx(0, abs=1e-12)
    assert sum(r * p.num_seqs for r, p in zip(rests, points, strict=True)) == pytest.approx(0)
    assert fixed_s > 0
    assert per_seq_s > 0


def test_two_rates_differ_in_nothing_but_the_rate():
    trace = make_trace("alpaca", [(i + 1, 2 * i + 1) for i in range(10)])
    slow, fast = trace.jobs(1.0, 100.0), trace.jobs(2.0, 50.0)
    assert len(slow) == len(fast)
    for one, other in zip(slow, fast, strict=True):
        assert one.arrival_s == pytest.approx(2 * other.arrival_s)
        assert dataclasses.replace(one, arrival_s=0.0) == dataclasses.replace(other, arrival_s=0.0)
    # Every length once before any comes again.
    assert sorted(job.prompt_tokens for job in slow[:10]) == list(range(1, 11))
    assert slow == trace.jobs(1.0, 100.0)
    assert slow != trace.jobs(1.0, 100.0, seed=1)


def test_requests_that_no_sequence_has_room_for_are_left_out():
    assert make_trace("x", [(2000, 47), (2000, 48)]).lengths == ((2000, 47),)


def test_scaled_lengths_have_the_papers_means():
    trace = make_trace("sharegpt", [(10 + i % 90, 50 + i % 400) for i in range(2000)])
    assert traces.scale_to_paper(trace).mean_lengths == pytest.approx(
        published.MEAN_LENGTHS["sharegpt"], rel=0.01
    )


def test_translations_have_the_stated_moments():
    trace = traces.translation_trace(80, num=20_000)
    prompt, output = trace.mean_lengths
    assert prompt == pytest.approx(80 + 2 + traces.TRANSLATION["source"], rel=0.02)
    assert output == pytest.approx(traces.TRANSLATION["target"], rel=0.02)


def test_a_shared_prefix_is_found_in_the_cache():
    jobs = make_jobs([(100, 4)] * 20, gap_s=1.0, prefix_tokens=80)
    checked = Checked(make_paged(SLOTS, enable_prefix_caching=True))
    simulate(checked, jobs, STEP, warmup_s=0.0)
    # 80 tokens are five blocks: computed once.
    assert checked.num_tokens == 20 * (20 + 3) + 80


def test_copying_instead_of_computing_again_serves_the_same():
    jobs = make_jobs([(20, 60)] * 30)
    again, copied = (
        simulate(make_paged(512, admission_watermark=0.0, link=link), jobs, STEP, warmup_s=0.0)
        for link in (None, Link(STEP.model))
    )
    assert again.num_preemptions == copied.num_preemptions > 0
    assert again.recomputed > 0.05
    assert copied.recomputed < again.recomputed


@pytest.mark.parametrize("width", beams.WIDTHS)
def test_replayed_beams_are_those_that_were_recorded(width):
    records = beams.load_records(width)
    assert len(records) >= 8
    for record in records:
        assert len(record.parents) >= 32
        assert all(0 <= parent < width for step in record.parents for parent in step)
        assert record.num_replaced == [width - len(set(step)) for step in record.parents]
    assert beams.record_of(width, len(records) + 1) is records[1]


def test_an_unrecorded_beam_width_is_refused():
    with pytest.raises(ValueError, match=r"width must be one of \(2, 4, 6\), got 3"):
        beams.load_records(3)


@pytest.mark.parametrize("width", beams.WIDTHS)
def test_beams_share_more_than_samples(width):
    lengths = [(20, 40), (7, 55), (30, 13)] * 5
    saved = {}
    for is_beam in (False, True):
        checked = Checked(make_paged(4096))
        jobs = make_jobs(lengths, num_seqs=width, is_beam=is_beam)
        saved[is_beam] = simulate(checked, [*jobs, Job(99, 2.0, 5, 5)], STEP, warmup_s=0.0).saved
        assert len(checked.done) == len(jobs) + 1
        assert checked.usage().allocated == 0
    assert saved[True] > saved[False] > 0


def test_preempted_beams_are_served_too():
    jobs = make_jobs([(20, 60)] * 8, num_seqs=4, is_beam=True)
    checked = Checked(make_paged(640, admission_watermark=0.0))
    outcome = simulate(checked, jobs, STEP, warmup_s=0.0)
    assert outcome.num_preemptions > 0
    assert len(checked.done) == len(jobs)


def test_the_search_brackets_the_rate():
    trace = make_trace("alpaca", [(20, 30), (10, 60)])
    setting = paper_setting().replace(duration_s=60.0)
    curve = search("Orca (Max)", trace, 1.0, setting)
    limit = experiments.SUSTAINED_LATENCY_S
    rates = [point.rate for point in curve.points]
    assert rates == sorted(rates)
    kept = [p.rate for p in curve.points if p.normalized_latency_s <= limit]
    assert curve.sustained_rate == max(kept)
    lost = [p.rate for p in curve.points if p.normalized_latency_s > limit]
    assert min(lost) / curve.sustained_rate == pytest.approx(1.25 ** (1 / 16))
    between = curve.rate_at(0.1)
    assert between is not None
    assert between < curve.sustained_rate
    assert curve.rate_at(0.0) is None


def test_runs_are_repeatable():
    trace = Trace("alpaca", ((20, 30), (10, 60)), num_seqs=2)
    setting = device_setting().replace(duration_s=20.0)
    assert run("paged", trace, 5.0, setting) == run("paged", trace, 5.0, setting)
    with pytest.raises(KeyError):
        run("vLLM", trace, 5.0, setting)


def _check_reports(summary, folder):
    written = {json.loads(f.read_text())["figure"] for f in folder.glob("figure_*.json")}
    assert written == {*driver.EXPERIMENTS, "13"}
    assert summary["quick"]
    assert {check["figure"] for check in summary["checks"]} == {"2", "12", "13", "15", "16", "17"}
    assert all(math.isfinite(check["value"]) for check in summary["checks"])


def test_all_figures_run(tmp_path, capsys):
    shared = shared_dir()
    if shared is None:
        pytest.skip("no shared workloads here")
    plots = [] if importlib.util.find_spec("matplotlib") else ["--no-plots"]
    arguments = ["--workloads", str(shared / "workloads"), "--out", str(tmp_path), "--quick"]
    summary = driver.main([*arguments, "--workers", "1", *plots])
    _check_reports(summary, tmp_path)
    if not plots:
        drawn = {file.stem for file in tmp_path.glob("*.png")}
        assert drawn == {f"figure_{name}" for name in {*driver.EXPERIMENTS, "13"} - {"calibration"}}
    assert "rate over Oracle's" in capsys.readouterr().out


def test_quick_results_do_not_land_among_the_real_ones(tmp_path, capsys):
    with pytest.raises(SystemExit):
        driver.main(["--workloads", str(tmp_path), "--quick"])
    assert "--quick needs --out" in capsys.readouterr().err
