"""Models that score a pair, against their published description: PairRM, and RLHFlow's pair model."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from support.families import HIDDEN, Tiny, llama3_tokenizer, small_body
from support.models import TOKENIZERS
from torch.nn import functional

from rmcore import Preference, RewardModel
from rmcore._base.errors import CheckpointError, InputError
from rmcore.engine import RewardEngine
from rmcore.engine.own_critic import OwnCritic
from rmcore.model.language_model import language_model

PROMPT = "what is the capital of France?"
RESPONSES = ["Paris is the capital of France.", "a dog", "the quick brown fox runs home"]
CHAT = [
    {"role": "user", "content": PROMPT},
    {"role": "assistant", "content": "Paris"},
    {"role": "user", "content": "is a dog quick?"},
]
MARKS = ("<|source|>", "<|candidate1|>", "<|candidate2|>")


def pairrm() -> Tiny:
    tokenizer = TOKENIZERS["bert"]()
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)})
    config = transformers.DebertaV2Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=256,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        position_biased_input=False,
        type_vocab_size=0,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(3)
    body = transformers.DebertaV2Model(config).eval()
    for parameter in body.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    tensors = {f"pretrained_model.{name}": value.clone() for name, value in body.state_dict().items()}
    tensors |= {"head_layer.1.weight": torch.randn(HIDDEN, 2 * HIDDEN) / 4, "head_layer.1.bias": torch.randn(HIDDEN)}
    tensors |= {"head_layer.4.weight": torch.randn(2, HIDDEN), "head_layer.4.bias": torch.randn(2)}
    own = {"architectures": ["DebertaV2PairRM"], "n_tasks": 2, "drop_out": 0.05, "cand_prefix_id": 9}
    keys = ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id")
    own |= dict(zip(keys, tokenizer.convert_tokens_to_ids(list(MARKS)), strict=True))
    return Tiny(tensors, {**config.to_dict(), **own}, tokenizer, body)


@torch.no_grad()
def pairrm_logit(tiny: Tiny, source: str, first: str, second: str) -> float:
    """The card's ``tokenize_pair``, then its forward."""
    parts = zip(MARKS, (source, first, second), strict=True)
    ids = list(itertools.chain.from_iterable(tiny.tokenizer.encode(mark + text) for mark, text in parts))
    states = tiny.body(input_ids=torch.tensor([ids])).last_hidden_state[0]
    at = [states[ids.index(tiny.tokenizer.convert_tokens_to_ids(mark))] for mark in MARKS]

    def score(candidate: torch.Tensor) -> torch.Tensor:
        x = functional.linear(torch.cat([at[0], candidate]), *parts_of(tiny, "head_layer.1"))
        return functional.linear(torch.tanh(x), *parts_of(tiny, "head_layer.4"))

    return float((score(at[1]) - score(at[2])).mean())


def parts_of(tiny: Tiny, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return tiny.tensors[f"{name}.weight"], tiny.tensors[f"{name}.bias"]


def pairpm() -> Tiny:
    tokenizer = llama3_tokenizer()
    body = small_body("llama", tokenizer)
    tensors = {f"model.{name}": value.clone() for name, value in body.state_dict().items()}
    generator = torch.Generator().manual_seed(5)
    tensors["lm_head.weight"] = torch.randn(len(tokenizer), HIDDEN, generator=generator)
    return Tiny(tensors, {**body.config.to_dict(), "architectures": ["LlamaForCausalLM"]}, tokenizer, body)


PUBLISHED = (
    "\n{% for message in messages %}{% if loop.index0 % 2 == 0 %}\n\n<turn> user\n {{ message['content'] }}"
    "{% else %}\n\n<turn> assistant\n {{ message['content'] }}{% endif %}{% endfor %}\n\n\n"
)


@torch.no_grad()
def pairpm_logit(tiny: Tiny, messages: list[dict[str, str]], first: str, second: str) -> float:
    """The card's example: its own template for the context, then the model's for one user turn, without its bos."""
    context = tiny.tokenizer.apply_chat_template(messages, tokenize=False, chat_template=PUBLISHED)
    text = f"[CONTEXT] {context} [RESPONSE A] {first} [RESPONSE B] {second} \n"
    turn = tiny.tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
    ids = tiny.tokenizer.encode(turn.replace(tiny.tokenizer.bos_token, ""), add_special_tokens=False)
    logits = tiny.tensors["lm_head.weight"] @ tiny.body(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    a, b = (tiny.tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "AB")
    return float(logits[a] - logits[b])


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, tuple[Tiny, RewardModel]]:
    found = {}
    for name, folder, tiny in (
        ("pairrm", "PairRM-hf", pairrm()),
        ("rlhflow-pair", "pair-preference-model-x", pairpm()),
    ):
        path = tiny.write(tmp_path_factory.mktemp("pairs") / folder)
        found[name] = (tiny, RewardModel.from_pretrained(path, device="cpu"))
        assert found[name][1].backbone.config.family == name
    return found


def check(found: Any, theirs: list[list[float]]) -> None:
    wanted = torch.tensor(theirs, dtype=torch.float64)
    assert float(wanted.abs().max()) > 1e-2
    torch.testing.assert_close(found.logit, (wanted - wanted.T) / 2, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.preference, found.logit)


def square(logit: Any) -> list[list[float]]:
    return [[0.0 if i == j else logit(a, b) for j, b in enumerate(RESPONSES)] for i, a in enumerate(RESPONSES)]


def test_pairrm_scores_each_order_as_its_card_does(models):
    tiny, model = models["pairrm"]
    wanted = square(lambda a, b: pairrm_logit(tiny, PROMPT, a, b))
    found = model.score(PROMPT, RESPONSES)
    check(found, wanted)
    compared = torch.tensor(wanted, dtype=torch.float64)
    # LLM-Blender's get_scores_from_cmps, policy max_logits, which its rank(return_scores=True) gives
    torch.testing.assert_close(found.scores, (compared - compared.T).mean(1), rtol=0, atol=2e-5)
    assert model.score(PROMPT, RESPONSES, orders="one").scores is None
    assert model.score(PROMPT, RESPONSES[:1]).scores.tolist() == [0.0]


def test_pairrm_of_a_conversation_writes_the_turns_as_its_card_does(models):
    tiny, model = models["pairrm"]
    source = "Finish the following coversation in each i-th turn by filling in <Response i> with your response."
    source += f"USER: {PROMPT}\nAssistant: <Response 1>\nUSER: is a dog quick?\nAssistant: <Response 2>"

    def logit(a: str, b: str) -> float:
        return pairrm_logit(tiny, source, *(f"<Response 1>: Paris\n<Response 2>: {text}" for text in (a, b)))

    check(model.score([CHAT], [RESPONSES])[0], square(logit))


@pytest.mark.parametrize("messages", [CHAT[:1], CHAT], ids=["one turn", "three turns"])
def test_the_pair_model_averages_probabilities_over_the_orders(models, messages):
    """As its authors' ``PairPMPipeline``: softmax over the two letters, the mean of both positions of a response."""
    tiny, model = models["rlhflow-pair"]
    found = model.score([messages], [RESPONSES])[0]
    asked = square(lambda a, b: pairpm_logit(tiny, messages, a, b))
    for i, j in itertools.permutations(range(len(RESPONSES)), 2):
        first = 1 / (1 + math.exp(-asked[i][j]))  # P(A), this response at A
        second = 1 - 1 / (1 + math.exp(-asked[j][i]))  # P(B), this response at B
        assert float(found.preference[i, j].sigmoid()) == pytest.approx((first + second) / 2, abs=1e-5)
        assert float(found.preference[i, j]) == -float(found.preference[j, i])
    torch.testing.assert_close(found.logit, found.preference)
    assert found.scores is None
    engine = RewardEngine(model).score([messages], [RESPONSES])[0]
    torch.testing.assert_close(engine.preference, found.preference, rtol=0, atol=1e-6)
    one = model.score([messages], [RESPONSES], orders="one")[0]
    assert float(one.logit[0, 1]) == pytest.approx(asked[0][1], abs=1e-5)


def test_the_difference_of_two_rows_is_not_rounded_to_the_bodys_dtype(tmp_path):
    tiny = pairpm()
    folder = tiny.write(tmp_path / "pair-preference-model-x")
    model = RewardModel.from_pretrained(folder, device="cpu", dtype=torch.bfloat16)
    a, b = (tiny.tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "AB")
    rows = tiny.tensors["lm_head.weight"]
    assert torch.equal(model.backbone.scalar_head()[0], rows[a] - rows[b])


@pytest.mark.parametrize("name", ["pairrm", "rlhflow-pair"])
def test_upgraded_the_orders_keep_their_logits(models, name, tmp_path):
    _, plain = models[name]
    preferences = [Preference(PROMPT, f"a good {word}", f"a bad {word}") for word in ("dog", "fox", "answer")]
    model = RewardModel.upgrade(plain.backbone, preferences, dtype=torch.float32)
    assert model.mode == "concat"
    before, after = plain.score(PROMPT, RESPONSES), model.score(PROMPT, RESPONSES)
    torch.testing.assert_close(after.logit, before.logit, rtol=0, atol=1e-5)
    assert float(after.uncertainty[0, 1]) > 1
    model.save_pretrained(tmp_path / "saved", backbone="embed")
    again = RewardModel.from_pretrained(tmp_path / "saved", device="cpu").score(PROMPT, RESPONSES)
    torch.testing.assert_close(again.logit, after.logit, rtol=0, atol=1e-6)


def test_equal_responses_are_told_whatever_the_order(models):
    _, model = models["pairrm"]
    same, apart = model.encode_group(PROMPT, ["Paris", "PARIS"]), model.encode_group(PROMPT, ["Paris", "a dog"])
    assert all(text.equal_responses for text in same)  # the tokenizer knows no case
    assert not any(text.equal_responses for text in apart)


def test_one_response_alone_is_refused(models):
    with pytest.raises(InputError, match="second"):
        models["pairrm"][1].backbone.encoder.encode(PROMPT, "Paris")


def test_faults_are_named(tmp_path):
    tiny = pairrm()
    del tiny.config["cand2_prefix_id"]
    with pytest.raises(CheckpointError, match="cand2_prefix_id"):
        RewardModel.from_pretrained(tiny.write(tmp_path / "a"), device="cpu")
    other = pairpm()
    del other.tensors["lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        RewardModel.from_pretrained(other.write(tmp_path / "pair-preference-model"), device="cpu")


# -- CLoud -----------------------------------------------------------------------------------------------------------

CRITIQUE = "The following is a break down on the correctness and usefulness of the assistant's response to my question:"


def test_cloud_scores_a_response_behind_its_critique(tmp_path):
    """The body's configuration is in another folder; the language model's head writes, and changes no score."""
    tokenizer = llama3_tokenizer()
    body = small_body("llama", tokenizer)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(body.config.to_dict()))
    tensors = {f"reward_base_model.model.{name}": value.clone() for name, value in body.state_dict().items()}
    written = torch.randn(len(tokenizer), HIDDEN, generator=torch.Generator().manual_seed(8))
    tensors["reward_base_model.lm_head.weight"] = written
    torch.manual_seed(9)
    tensors |= {
        f"reward_head.{part}.weight": torch.randn(n, HIDDEN) for part, n in (("dense", HIDDEN), ("out_proj", 1))
    }
    tensors |= {f"reward_head.{part}.bias": torch.randn(n) for part, n in (("dense", HIDDEN), ("out_proj", 1))}
    config = {"architectures": ["CLoudRewardModel"], "feedback_method": "teacher"}
    config["base_model_name_or_path"] = str(tmp_path / "base")
    tiny = Tiny(tensors, config, tokenizer, body)
    model = RewardModel.from_pretrained(tiny.write(tmp_path / "cloud"), device="cpu")
    assert model.backbone.config.family == "cloud"

    def critiqued(answer: str, critique: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": answer}, {"role": "user", "content": CRITIQUE + critique}]

    responses = [critiqued("Paris", "It is right."), critiqued("a dog", "It is wrong, and no answer.")]
    found = model.score([CHAT[:1]], [responses])[0]
    for response, score in zip(responses, found.scores.tolist(), strict=True):
        ids = tokenizer.apply_chat_template([CHAT[0], *response], tokenize=True, return_dict=False)
        with torch.no_grad():
            state = body(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        dense = torch.tanh(functional.linear(state, *parts_of(tiny, "reward_head.dense")))
        assert score == pytest.approx(
            float(functional.linear(dense, *parts_of(tiny, "reward_head.out_proj"))[0]), abs=1e-5
        )
    model.save_pretrained(tmp_path / "saved", backbone="embed")
    again = RewardModel.from_pretrained(tmp_path / "saved", device="cpu")
    ids = torch.tensor([[1, 5, 7]])
    with torch.no_grad():
        logits = functional.linear(body(input_ids=ids).last_hidden_state, written)
        for own in (model.backbone, again.backbone):
            torch.testing.assert_close(language_model(own)(ids).logits, logits, rtol=1e-4, atol=1e-5)
    assert OwnCritic(language_model(again.backbone), again.backbone.encoder, max_new_tokens=3).critique("p", "Paris")
    del tiny.tensors["reward_base_model.lm_head.weight"]
    save_file(tiny.tensors, tmp_path / "cloud" / "model.safetensors", {"format": "pt"})
    mute = RewardModel.from_pretrained(tmp_path / "cloud", device="cpu")  # it still scores
    with pytest.raises(CheckpointError, match=r"reward_base_model\.lm_head\.weight"):
        language_model(mute.backbone)
    del tiny.tensors["reward_head.out_proj.bias"], tiny.tensors["reward_head.out_proj.weight"]
    save_file(tiny.tensors, tmp_path / "cloud" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"reward_head\.out_proj\.weight"):
        RewardModel.from_pretrained(tmp_path / "cloud", device="cpu")
    assert Path(config["base_model_name_or_path"]).is_dir()
