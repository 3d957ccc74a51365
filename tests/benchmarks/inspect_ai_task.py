"""Inspect AI at the task of the figures: one note and one graded score a sample. Runs by the Python of its own environment.

    python3 -m venv ~/inspect-env && ~/inspect-env/bin/pip install inspect-ai openai
    ~/inspect-env/bin/python inspect_ai_task.py task.json

`task.json` holds what bed.py gives our own worker: the messages, the schema of the verdicts, the criteria, how many samples
and how many calls at once; and `base_url` of the stub, or null for Inspect's mock model, which then answers at once with
`note` and `verdicts`. It prints one line of JSON: the samples that were scored, and when the first began and the last ended,
as the eval's log has it. Inspect runs as it does by default, but without a display, and with as many samples and
connections as calls.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from datetime import datetime
from typing import Any

task: dict[str, Any] = {}
if __name__ == "__main__":  # before Inspect is imported, which reads its environment
    with open(sys.argv[1]) as file:
        task = json.load(file)
    os.environ |= {"STUB_API_KEY": "benchmark", "STUB_BASE_URL": task["base_url"] or ""}

from inspect_ai import Task, eval  # noqa: E402
from inspect_ai.dataset import MemoryDataset, Sample  # noqa: E402
from inspect_ai.model import (  # noqa: E402
    ChatMessageSystem,
    ChatMessageUser,
    GenerateConfig,
    Model,
    ModelOutput,
    ModelUsage,
    ResponseSchema,
    get_model,
)
from inspect_ai.scorer import Score, Scorer, Target, mean, scorer, stderr  # noqa: E402
from inspect_ai.solver import TaskState, generate  # noqa: E402
from inspect_ai.util import JSONSchema  # noqa: E402


@scorer(metrics=[mean(), stderr()])
def weighted_verdicts() -> Scorer:
    """Let the model grade its note by the criteria, and weigh its verdicts."""
    system, prompt = task["grade_messages"]
    schema = JSONSchema.model_validate(task["schema"])
    # which has no room for the number of verdicts; what strict modes are told in words, the stub reads too
    schema.properties["verdicts"].description = f"minItems: {len(task['criteria'])}"
    form = ResponseSchema(name="verdicts", description="The verdicts.", strict=True, json_schema=schema)
    config = GenerateConfig(response_schema=form)

    async def score(state: TaskState, target: Target) -> Score:
        messages = [
            ChatMessageSystem(content=system),
            ChatMessageUser(content=prompt.replace("{note}", state.output.completion)),
        ]
        answer = await get_model().generate(messages, config=config)
        verdicts = json.loads(answer.completion)["verdicts"]
        total = sum(
            criterion["weight"] * verdict["satisfaction"] / 100
            for criterion, verdict in zip(task["criteria"], verdicts, strict=True)
        )
        return Score(value=total, answer=state.output.completion, explanation=answer.completion)

    return score


def _model() -> Model:
    if task["base_url"]:
        return get_model("openai-api/stub/stub")

    def answer(messages: Any, tools: Any, choice: Any, config: GenerateConfig) -> ModelOutput:
        output = ModelOutput.from_content("mockllm", task["verdicts" if config.response_schema else "note"])
        # given here, because to count them it would need the network
        output.usage = ModelUsage(input_tokens=300, output_tokens=130, total_tokens=430)
        return output

    return get_model("mockllm/model", custom_outputs=answer)


def main() -> None:
    system, prompt = task["note_messages"]
    samples = [
        Sample(id=number, input=[ChatMessageSystem(content=system), ChatMessageUser(content=prompt)])
        for number in range(task["samples"])
    ]
    with tempfile.TemporaryDirectory() as folder:
        [log] = eval(
            Task(dataset=MemoryDataset(samples), solver=generate(), scorer=weighted_verdicts()),
            model=_model(),
            display="none",
            log_dir=folder,
            max_samples=task["concurrency"],
            max_connections=task["concurrency"],
        )
        failed = [sample.error.message for sample in log.samples or [] if sample.error] or [log.error]
        # its samples are read from the log's file, which must still be there
        done = [sample for sample in log.samples or [] if sample.scores and sample.error is None]
        times = [
            (datetime.fromisoformat(s.started_at), datetime.fromisoformat(s.completed_at))
            for s in done
            if s.started_at and s.completed_at
        ]
    if len(times) < len(samples):
        sys.exit(f"{len(samples) - len(times)} samples were not scored: {log.status}, {failed[0]}")
    print(
        json.dumps(
            {
                "samples": len(times),
                "started_at": min(start for start, _ in times).timestamp(),
                "completed_at": max(end for _, end in times).timestamp(),
                "stats": [log.stats.started_at, log.stats.completed_at],
            }
        )
    )


if __name__ == "__main__":
    main()
