"""A task set of verifiers: name the larger digit."""

import verifiers.v1 as vf


class DigitData(vf.TaskData):
    answer: str


class DigitTask(vf.Task[DigitData]):
    @vf.reward(weight=2.0)
    async def named(self, trace: vf.Trace) -> float:
        return float(self.data.answer in trace.last_reply)

    @vf.reward
    async def brief(self, trace: vf.Trace, runtime: vf.Runtime) -> float:
        """A reward that runs something: a quarter for a single character."""
        await runtime.write("reply.txt", trace.last_reply.encode())
        counted = await runtime.run(["wc", "-c", "reply.txt"], {})
        return 0.25 * (counted.stdout.split()[0] == "1")

    @vf.metric
    async def replies(self, trace: vf.Trace) -> float:
        return float(trace.num_turns)


class DigitConfig(vf.TasksetConfig):
    num_tasks: int = 8
    kind: str = "plain"


class DigitTaskset(vf.Taskset[DigitTask, DigitConfig]):
    def load(self):
        for number in range(self.config.num_tasks):
            low, high = number % 3 + 1, number % 3 + 2
            data = DigitData(prompt=f"{low} or {high}?", answer=str(high), system_prompt="Short.")
            yield DigitTask(data, self.config.task)


__all__ = ["DigitTaskset"]
