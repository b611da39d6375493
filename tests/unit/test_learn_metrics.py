from torchrft.learn.batch import make_batch
from torchrft.learn.metrics import StepMetrics, average
from torchrft.types import Completion, Prompt, Sample, Score


def mean_of(steps):
    return average(
        [
            StepMetrics(loss, {"kl": 2 * loss}, {"worst": worst}, loss, 0.5, skipped)
            for loss, worst, skipped in steps
        ]
    )


def test_a_skipped_step_does_not_spoil_the_mean():
    nan = float("nan")
    for order in ([0, 1, 2], [1, 0, 2], [1, 2, 0]):
        steps = [(nan, 9.0, True), (2.0, 0.5, False), (4.0, 0.25, False)]
        mean = mean_of([steps[index] for index in order])
        assert mean == StepMetrics(3.0, {"kl": 6.0}, {"worst": 0.5}, 3.0, 0.5, False)


def test_only_skipped_steps_show_what_they_measured():
    mean = mean_of([(2.0, 0.5, True)])
    assert mean == StepMetrics(2.0, {"kl": 4.0}, {"worst": 0.5}, 2.0, 0.5, True)


def test_a_filler_does_not_count_in_the_loss():
    completion = Completion(0, 0, (7, 8), (-1.0, -2.0), "", "stop")
    prompt = Prompt(row=0, text="", token_ids=(3,))
    samples = [Sample(prompt, completion, Score(1.0), 0, filler) for filler in (False, True)]
    assert make_batch(samples).mask.tolist() == [[True, True], [False, False]]
