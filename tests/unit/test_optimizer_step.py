from torchrft.data.batch import make_batch
from torchrft.optimizer_step import Mean
from torchrft.types import Completion, Prompt, Sample, Score


def mean_of(steps):
    mean = Mean()
    for loss, worst, skipped in steps:
        mean.add({"loss": loss, "worst": worst, "skipped": skipped}, maxima=("worst",))
    return mean


def test_a_skipped_step_does_not_spoil_the_mean():
    nan = float("nan")
    for order in ([0, 1, 2], [1, 0, 2], [1, 2, 0]):
        steps = [(nan, 9.0, 1.0), (2.0, 0.5, 0.0), (4.0, 0.25, 0.0)]
        mean = mean_of([steps[index] for index in order])
        assert mean.result() == {"loss": 3.0, "worst": 0.5}
        assert (mean.steps, mean.skipped) == (3, 1)


def test_only_skipped_steps_show_what_they_measured():
    mean = mean_of([(2.0, 0.5, 1.0)])
    assert mean.result() == {"loss": 2.0, "worst": 0.5}
    assert (mean.steps, mean.skipped) == (1, 1)


def test_a_filler_does_not_count_in_the_loss():
    completion = Completion(0, 0, (7, 8), (-1.0, -2.0), "", "stop")
    prompt = Prompt(row=0, text="", token_ids=(3,))
    samples = [Sample(prompt, completion, Score(1.0), 0, filler) for filler in (False, True)]
    assert make_batch(samples).mask.tolist() == [[True, True], [False, False]]
