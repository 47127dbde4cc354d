"""Shapes and masks drawn by hypothesis, which a stock GPU image does not have."""

from hypothesis import strategies as st
from kernel_inputs import token_mask
from torch import Tensor


@st.composite
def batches(draw: st.DrawFn) -> tuple[tuple[int, int, int], Tensor | None]:
    """A shape (B, S, F) around the sizes of chunks and tiles, and a mask of its tokens."""
    batch, seq_len = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 9, 127, 128, 129]))
    shape = batch, seq_len, draw(st.sampled_from([1, 5, 127, 128, 130]))
    if draw(st.booleans()):
        return shape, None
    lengths = draw(st.lists(st.integers(0, seq_len), min_size=batch, max_size=batch))
    return shape, token_mask(lengths, seq_len, draw(st.sampled_from(["left", "right"])))
