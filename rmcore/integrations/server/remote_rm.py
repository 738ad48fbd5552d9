"""OpenRLHF's reward calls: what is the response, and which queries make a group.

Read from ``openrlhf/utils/agent.py`` (SingleTurnAgentExecutor): ``query`` is the decoded prompt and action tokens with
special tokens kept, ``prompts`` the prompt string they came from. With several servers all but the first get empty
lists. An answer that is no 200 is retried four times, a second apart; then the sample has no reward and the run stops.
"""

from __future__ import annotations

from rmcore._base.errors import reject
from rmcore.integrations.server.settings import ServeSettings

__all__ = ["grouped", "prompt_text", "response_text"]


def response_text(query: str, prompt: str, end_tokens: tuple[str, ...], where: str = "query") -> str:
    """The response: what follows the prompt, without the special tokens at its end.

    Special tokens before the prompt (a BOS the tokenizer added, padding) are skipped too.

    Raises:
        InputError: the query does not start with the prompt: it was cut, or decoded to other characters.
    """
    start = query
    while not start.startswith(prompt):
        token = next((t for t in ("<s>", "<bos>", "<|begin_of_text|>", *end_tokens) if start.startswith(t)), None)
        if token is None:
            reject(
                where,
                f"{query[:40]!r}...",
                f"the prompt {prompt[:40]!r}..., then the response",
                "A prompt longer than OpenRLHF's limit is cut before it comes here: raise that limit",
            )
        start = start[len(token) :]
    response = start[len(prompt) :]
    while token := next((t for t in end_tokens if response.endswith(t)), ""):
        response = response[: -len(token)]
    return response


def prompt_text(prompt: str, settings: ServeSettings, where: str = "prompts") -> str:
    """The prompt without the policy's chat template, where the settings say what that is.

    Raises:
        InputError: the prompt does not have it.
    """
    prefix, suffix = settings.prompt_prefix, settings.prompt_suffix
    bare = prompt.removeprefix(prefix).removesuffix(suffix)
    if len(bare) != len(prompt) - len(prefix) - len(suffix):
        reject(where, f"{prompt[:40]!r}...{prompt[-40:]!r}", f"a text between {prefix!r} and {suffix!r}")
    return bare


def grouped(prompts: list[str], size: int | None) -> list[list[int]]:
    """Places of each group's members: equal prompts, in order, ``size`` at a time.

    Raises:
        InputError: a prompt comes a number of times that is no multiple of ``size`` (or once, without a size).
    """
    places: dict[str, list[int]] = {}
    for k, prompt in enumerate(prompts):
        places.setdefault(prompt, []).append(k)
    groups: list[list[int]] = []
    for prompt, found in places.items():
        if size is None and len(found) < 2:
            reject(
                "prompts", f"{prompt[:40]!r} once", "twice or more, since the server was started without --group-size"
            )
        if size is not None and len(found) % size:
            reject("prompts", f"{prompt[:40]!r} {len(found)} times", f"a multiple of --group-size {size}")
        step = size or len(found)
        groups += [found[start : start + step] for start in range(0, len(found), step)]
    return groups
