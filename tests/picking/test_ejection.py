"""Passive health: what requests meet, in virtual time. Probe answers are given by hand."""

from hypothesis import given, settings
from hypothesis import strategies as st

from apis.policy import Endpoint, Route
from extproc.picking import HealthSettings, Outcome, Picker
from extproc.picking.engine import Engine

HEALTH = HealthSettings()


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def fleet(engines: int) -> tuple[Picker, Endpoint, Clock]:
    clock = Clock()
    picker = Picker(clock=clock)
    target = Endpoint("ns", "m", "m", (Route("a", 1, tuple(f"a:{port}" for port in range(engines))),))
    picker.set_policy([target])
    return picker, target, clock


def meet(picker: Picker, address: str, outcome: Outcome, times: int = 1) -> None:
    for _ in range(times):
        picker.begin(address)
        picker.end(address, outcome)


def probe(picker: Picker, address: str) -> None:
    engine = picker._engines[address]
    picker._probe_answered(engine, engine.epoch)


def chosen(picker: Picker, target: Endpoint, picks: int = 12) -> set[str]:
    seen: set[str] = set()
    for _ in range(picks):
        pick = picker.pick(target)
        seen.update(pick.addresses if pick else ())
    return seen


def test_an_engine_lost_once_is_not_picked_before_it_answers():
    picker, target, clock = fleet(2)
    meet(picker, "a:0", Outcome.UNREACHABLE)
    clock.now_s += 3600
    assert chosen(picker, target) == {"a:1"}
    probe(picker, "a:0")
    assert chosen(picker, target) == {"a:0", "a:1"}


def test_with_all_engines_down_there_is_no_pick():
    picker, target, _ = fleet(2)
    meet(picker, "a:0", Outcome.UNREACHABLE)
    meet(picker, "a:1", Outcome.UNREACHABLE)
    assert picker.pick(target) is None


def test_one_crash_under_load_counts_once():
    picker, target, _ = fleet(2)
    for _ in range(50):
        picker.begin("a:0")
    for _ in range(50):
        picker.end("a:0", Outcome.UNREACHABLE)
    assert picker.snapshot()[0].ejected_for_s == 0
    probe(picker, "a:0")
    assert chosen(picker, target) == {"a:0", "a:1"}


def test_an_engine_that_answers_probes_but_loses_requests_is_ejected_ever_longer():
    picker, target, clock = fleet(2)
    spans = []
    for _ in range(5):
        for _ in range(HEALTH.losses_until_ejection):
            meet(picker, "a:0", Outcome.UNREACHABLE)
            probe(picker, "a:0")
        spans.append(picker.snapshot()[0].ejected_for_s)
        assert chosen(picker, target) == {"a:1"}
        clock.now_s += spans[-1]
        assert chosen(picker, target) == {"a:1"}, "the time alone brings nobody back"
        probe(picker, "a:0")
        assert chosen(picker, target) == {"a:0", "a:1"}
    assert spans == [5, 10, 20, 40, 60]


def test_good_conduct_clears_the_record():
    picker, _, clock = fleet(2)
    for pause_s in (0, 200):
        clock.now_s += pause_s
        meet(picker, "a:0", Outcome.FAILED, HEALTH.failures_until_ejection)
        assert picker.snapshot()[0].ejected_for_s == HEALTH.ejection_s
        clock.now_s += HEALTH.ejection_s
        probe(picker, "a:0")


def test_failures_in_a_row_eject_and_an_answer_between_starts_anew():
    picker, target, _ = fleet(2)
    meet(picker, "a:0", Outcome.FAILED, HEALTH.failures_until_ejection - 1)
    meet(picker, "a:0", Outcome.OK)
    meet(picker, "a:0", Outcome.FAILED, HEALTH.failures_until_ejection - 1)
    assert chosen(picker, target) == {"a:0", "a:1"}
    meet(picker, "a:0", Outcome.FAILED)
    assert chosen(picker, target) == {"a:1"}
    assert picker.snapshot()[0].last_error == "failed"


def test_failing_requests_cannot_close_an_endpoint():
    picker, target, _ = fleet(2)
    for address in ("a:0", "a:1"):
        meet(picker, address, Outcome.FAILED, 100)
    assert chosen(picker, target) == {"a:1"}


def test_failures_spare_an_engine_that_another_endpoint_has_alone():
    picker = Picker()
    both = Endpoint("ns", "both", "both", (Route("a", 1, ("a:0", "a:1")),))
    alone = Endpoint("ns", "alone", "alone", (Route("a", 1, ("a:0",)),))
    picker.set_policy([both, alone])
    meet(picker, "a:0", Outcome.FAILED, 100)
    assert chosen(picker, alone) == {"a:0"}


def test_a_client_that_leaves_says_nothing_about_the_engine():
    picker, target, _ = fleet(2)
    meet(picker, "a:0", Outcome.FAILED, HEALTH.failures_until_ejection - 1)
    meet(picker, "a:0", Outcome.ABANDONED, 5)
    assert chosen(picker, target) == {"a:0", "a:1"}
    meet(picker, "a:0", Outcome.FAILED)
    assert chosen(picker, target) == {"a:1"}


def test_a_late_answer_to_an_old_request_brings_nobody_back():
    picker, target, _ = fleet(2)
    picker.begin("a:0")
    meet(picker, "a:0", Outcome.UNREACHABLE)
    picker.end("a:0", Outcome.OK)
    assert chosen(picker, target) == {"a:1"}


def test_an_answer_to_a_probe_sent_before_the_loss_does_not_count():
    picker, target, _ = fleet(2)
    engine = picker._engines["a:0"]
    epoch_at_sending = engine.epoch
    meet(picker, "a:0", Outcome.UNREACHABLE)
    picker._probe_answered(engine, epoch_at_sending)
    assert chosen(picker, target) == {"a:1"}


def test_a_down_engine_stays_down_over_a_policy_change():
    picker, target, _ = fleet(2)
    meet(picker, "a:0", Outcome.UNREACHABLE)
    picker.set_policy([Endpoint("ns", "m", "m", (Route("a", 5, ("a:0", "a:1")), Route("b", 5, ("b:0",))))])
    assert chosen(picker, target) == {"a:1", "b:0"}


def test_a_down_route_gives_its_share_to_the_others_and_gets_it_back():
    picker = Picker()
    target = Endpoint("ns", "m", "m", (Route("a", 90, ("a:0",)), Route("b", 10, ("b:0",))))
    picker.set_policy([target])
    meet(picker, "a:0", Outcome.UNREACHABLE)
    assert {picker.pick(target).route for _ in range(50)} == {"b"}
    probe(picker, "a:0")
    drawn = [picker.pick(target).route for _ in range(100)]
    assert 85 <= drawn.count("a") <= 95


def test_one_timeout_is_not_proof_but_two_are():
    engine = Engine("a:0", HEALTH)
    assert not engine.probe_failed("timeout", certain=False)
    assert engine.usable
    assert engine.probe_failed("timeout", certain=False)
    assert not engine.usable
    other = Engine("a:1", HEALTH)
    other.probe_failed("timeout", certain=False)
    other.probe_answered(0.0, other.epoch)
    other.probe_failed("timeout", certain=False)
    assert other.usable


_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["unreachable", "failed", "ok", "probe", "refused", "timeout", "wait"]),
        st.integers(0, 2),
    ),
    max_size=80,
)


@settings(max_examples=150, deadline=None)
@given(_STEPS)
def test_what_went_down_is_never_picked_before_a_probe_answers_after_its_ejection(steps):
    picker, target, clock = fleet(3)
    for what, port in steps:
        address = f"a:{port}"
        engine = picker._engines[address]
        barred = not engine.usable
        ejected = engine.ejected_until_s > clock.now_s
        if what == "wait":
            clock.now_s += 7
        elif what == "probe":
            probe(picker, address)
        elif what in {"refused", "timeout"}:
            picker._probe_failed(engine, what, what == "refused")
        else:
            meet(picker, address, Outcome(what))
        if barred and (what != "probe" or ejected):
            assert not engine.usable
        fit = {state.address for state in picker.snapshot() if state.healthy}
        assert chosen(picker, target, 6) == fit
