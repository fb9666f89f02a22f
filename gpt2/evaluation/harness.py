"""Our models in lm-evaluation-harness (pip install 'build-gpt2[lm-eval]'), so that its tasks run on them.

`harness_model()` gives the class and registers it there as `build-gpt2`: lm_eval.simple_evaluate(model="build-gpt2",
model_args="pretrained=RUN", …). Contexts that several requests share, as in multiple choice, are computed once.
"""

import difflib
import math
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from gpt2.errors import RequestError, WorkError
from gpt2.evaluation.likelihood import Question, score
from gpt2.inference.engine import Engine, load

MAX_TOKENS = 256  # of a generation, where the task does not say; the harness's own default


class HarnessMethods:
    """What the harness asks of a model. Text is encoded as everywhere here: nothing in it is special."""

    cache_hook: Any
    """The harness's own: it stores answers if asked to."""

    def __init__(
        self,
        pretrained: str | Path | Engine,
        device: str = "auto",
        precision: str = "auto",
        batch_tokens: int = 0,
        progress: Callable[[int, int], None] | None = None,
        **_: Any,
    ) -> None:
        """pretrained: MODEL, or an engine. precision, batch_tokens, progress: those of `likelihood.score`.

        The harness's own batch sizes are taken and ignored: batch_tokens says how much goes through at once.
        """
        super().__init__()
        self.engine = pretrained if isinstance(pretrained, Engine) else load(pretrained, device)
        self.precision, self.batch_tokens, self.progress = precision, int(batch_tokens), progress
        self._device = next(self.engine.model.parameters()).device

    @property
    def eot_token_id(self) -> int:
        """End-of-text, which also stands for an empty context."""
        return self.engine.tokenizer.eot

    @property
    def max_length(self) -> int:
        """The model's context."""
        return self.engine.model.config.n_ctx

    @property
    def tokenizer_name(self) -> str:
        """For the harness's caches."""
        return f"{self.engine.tokenizer.name}-{self.engine.tokenizer.hash[:12]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; no special tokens are added."""
        return self.engine.tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, is it the greedy choice) of each (key, context, continuation).

        A context is cut on the left to what fits; equal contexts make one question. Raises RequestError for a
        continuation that is empty or longer than the model's context.
        """
        places: dict[tuple[int, ...], int] = {}
        endings: list[list[list[int]]] = []
        where: list[tuple[int, int]] = []
        for _key, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise RequestError(
                    f"a continuation of {len(continuation)} tokens cannot be scored by a model with a context of "
                    f"{self.max_length}: choose another task or a model with a longer context"
                )
            kept = tuple(context[-(self.max_length + 1 - len(continuation)) :])
            place = places.setdefault(kept, len(endings))
            if place == len(endings):
                endings.append([])
            where.append((place, len(endings[place])))
            endings[place].append(continuation)
        questions = [Question(context, endings[place]) for context, place in places.items()]
        scores = score(
            self.engine.model,
            questions,
            self.max_length,
            self._device,
            self.batch_tokens,
            self.precision,
            greedy=True,
            progress=self.progress,
        )
        answers = [(-scores[place][i].nats, scores[place][i].greedy) for place, i in where]
        for (key, _context, _continuation), answer in zip(requests, answers, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text behind end-of-text, in windows of the context, each token once."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            rolling = get_rolling_token_windows(self.tok_encode(request.args[0]), self.eot_token_id, self.max_length, 1)
            for context, continuation in map(make_disjoint_window, rolling):
                windows.append((None, context, continuation))
                owners.append(i)
        sums = [0.0] * len(requests)
        for owner, (log_likelihood, _greedy) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += log_likelihood
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context before the first of its stop texts: greedy unless it asks to sample."""
        texts = []
        for n, request in enumerate(requests):
            context, options = request.args
            until = options.get("until") or []
            names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
            tokens = int(next((options[name] for name in names if options.get(name) is not None), MAX_TOKENS))
            temperature = float(options.get("temperature") or 0.0) if options.get("do_sample", True) else 0.0
            room = self.max_length - tokens
            if room < 1:  # the engine goes on when the context is full
                room = max(1, self.max_length // 2)
            text = self.engine.generate(
                (self.tok_encode(context) or [self.eot_token_id])[-room:],
                max_tokens=tokens,
                temperature=temperature,
                top_k=options.get("top_k") or None,
                top_p=options.get("top_p"),
                stop=[stop for stop in ([until] if isinstance(until, str) else until) if stop],
                seed=n,
            )
            self.cache_hook.add_partial("generate_until", request.args, text)
            texts.append(text)
            if self.progress is not None:
                self.progress(n + 1, len(requests))
        return texts


@cache
def harness_model() -> type[HarnessMethods]:
    """The class of our models in the harness, made and registered when first asked for: the harness is an extra.

    Raises RequestError where it is not installed.
    """
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise RequestError(
            f"--task lm: needs lm-evaluation-harness ({error}): pip install 'build-gpt2[lm-eval]'"
        ) from error

    class HarnessModel(HarnessMethods, TemplateLM):  # type: ignore[misc]
        """`HarnessMethods` under the harness's own base class, which turns texts into tokens."""

    register_model("build-gpt2")(HarnessModel)
    return HarnessModel


def evaluate_tasks(
    model: HarnessMethods, names: Sequence[str], task_path: Path | None = None, limit: int = 0
) -> dict[str, Any]:
    """Runs tasks of the harness; gives {items, seconds, results: {task: {metric: value}}}, and the metrics of a
    single task beside them.

    task_path: directory with further task files (YAML), which may name data on the disk. limit: items a task; 0: all.
    Raises RequestError for an unknown task, WorkError where the harness fails (data that cannot be downloaded, …).
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    started = time.perf_counter()
    if task_path is not None and not task_path.is_dir():
        raise RequestError(f"there is no directory {task_path}: --task-path names one with task files (YAML)")
    manager = TaskManager(include_path=None if task_path is None else str(task_path))
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=1)
            mend = f"did you mean {close[0]}?" if close else "name a task of the harness, or its files by --task-path"
            raise RequestError(f"lm-evaluation-harness has no task {name!r}: {mend}")
    try:
        found = simple_evaluate(
            model=model, tasks=list(names), task_manager=manager, limit=limit or None, log_samples=False
        )
    except (RequestError, WorkError, MemoryError):
        raise
    except Exception as error:  # tasks bring code, data sets and downloads of their own
        reason = (str(error).strip().split("\n") or [""])[0][:300]
        raise WorkError(
            f"lm-evaluation-harness failed on {','.join(names)} ({type(error).__name__}: {reason}): without a network "
            "give task files and data by --task-path"
        ) from error
    results = {name: _figures(values) for name, values in found["results"].items()}
    single = dict(next(iter(results.values()))) if len(results) == 1 else {}
    items = sum(int(counts["effective"]) for counts in found["n-samples"].values())
    return {**single, "items": items, "seconds": time.perf_counter() - started, "results": results}


def _figures(values: dict[str, Any]) -> dict[str, float]:
    """{"acc,none": 0.5, "alias": "name"} -> {"acc": 0.5}; the name of another filter stays behind its metric."""
    return {
        name.removesuffix(",none"): value
        for name, value in values.items()
        if "," in name and isinstance(value, int | float) and math.isfinite(value)
    }
