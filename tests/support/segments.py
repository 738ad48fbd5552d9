"""Segments of a text, as tests look at them."""

from __future__ import annotations

from hypothesis import strategies as st

__all__ = ["SPECIALS", "parts", "prompts", "special_ids", "texts"]


SPECIALS = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "<s>", "</s>", "<pad>"]
# Any Unicode but lone surrogates, with whitespace, quotes and special tokens far likelier than by chance.
texts = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
        st.sampled_from(
            [*SPECIALS, " ", "\n", "\n\n", "good", "the fox", "###", "{prompt}", "{first}", "\t", "é", "🦊"]
        ),
    ),
    max_size=6,
).map("".join)
prompts = st.one_of(
    texts,
    st.lists(st.builds(lambda c: {"role": "user", "content": c}, texts), min_size=1, max_size=1),
)


def parts(encoded) -> dict[str, tuple[int, ...]]:
    return {segment.name: segment.ids for segment in encoded.segments}


def special_ids(tokenizer) -> set[int]:
    # [UNK] may come from any text; it has no meaning to abuse.
    return set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
