"""Keyed dropout: the mask of a row follows from its key, not from its batch."""

import pytest
import torch

from collm_dist.cf.keyed_dropout import KeyedDropout

KEYS = torch.randint(0, 2**62, (4000,), generator=torch.Generator().manual_seed(0))


def drop(values, keys, probability=0.3, site=0, **settings):
    return KeyedDropout(probability, site, values[0].numel())(values, keys, **settings)


def test_a_share_of_elements_is_dropped_and_the_rest_is_scaled():
    """Standard error of the share over 80,000 elements: .0016; windows overlap, so it is a little more."""
    dropped = drop(torch.ones(4000, 20), KEYS)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert torch.unique(dropped).tolist() == pytest.approx([0, 1 / 0.7])
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.015)
    per_column = (dropped == 0).float().mean(0)
    assert (per_column - 0.3).abs().max() < 0.04  # 5 standard errors of one column


def test_a_row_has_the_same_mask_in_any_batch():
    values = torch.ones(4000, 20)
    whole = drop(values, KEYS)
    assert torch.equal(drop(values[100:110], KEYS[100:110]), whole[100:110])
    assert not torch.equal(whole[:2000], whole[2000:])
    assert not torch.equal(drop(values, KEYS, site=1), whole)


@pytest.mark.parametrize("padding", [1, 4])
def test_padding_on_the_left_does_not_shift_masks(padding):
    """A worker pads to the longest history of its share of a batch; masks must not depend on that."""
    dropout = KeyedDropout(0.3, 0, 35)
    alone = dropout(torch.ones(900, 3, 5), KEYS[:900], from_end=True)
    padded = dropout(torch.ones(900, 3 + padding, 5), KEYS[:900], from_end=True)
    assert torch.equal(padded[:, padding:], alone)


def test_without_keys_nothing_is_dropped():
    values = torch.ones(3, 4)
    assert torch.equal(drop(values, None), values)
    assert torch.equal(drop(values, KEYS[:3], probability=0.0), values)


@pytest.mark.parametrize("width", [1 << 17, 1 << 18, (1 << 18) + 5])
def test_rows_of_any_width_are_dropped(width):
    """A history of 1,100 items with vectors of width 256 is wider than the default pool."""
    dropped = drop(torch.ones(2, width), KEYS[:2])
    assert (dropped == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert not torch.equal(dropped[0], dropped[1])
