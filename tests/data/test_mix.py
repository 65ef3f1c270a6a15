from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyeyes.data.mix import Mix, mix_batch
from manyeyes.errors import ConfigError

MIXES = [Mix(mixup=0.4), Mix(cutmix=1.0), Mix(mixup=0.4, cutmix=1.0)]


def batch(count, height=12, width=9, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, height, width, channels), np.uint8)
    return images, np.arange(count, dtype=np.int32), rng.permutation(10 * count)[:count].astype(np.int64)


@pytest.mark.parametrize("mix", MIXES)
@given(count=st.integers(0, 9), cut=st.integers(0, 4))
def test_a_pair_is_mixed_alike_in_any_batch(mix, count, cut):
    images, labels, indices = batch(count)
    together = images.copy()
    labels_b, lam = mix_batch(together, labels, indices, mix, 1, 2)
    cut = min(2 * cut, count)
    for rows in (slice(0, cut), slice(cut, count)):
        apart = images[rows].copy()
        part_b, part_lam = mix_batch(apart, labels[rows], indices[rows], mix, 1, 2)
        assert np.array_equal(apart, together[rows])
        assert np.array_equal(part_b, labels_b[rows])
        assert np.array_equal(part_lam, lam[rows])


def test_mixup_gives_each_image_its_share_to_half_a_grey_level():
    images, labels, indices = batch(50)
    mixed = images.copy()
    labels_b, lam = mix_batch(mixed, labels, indices, Mix(mixup=1.0), 0, 0)
    share = lam[:, None, None, None].astype(np.float64)
    expected = share * images + (1 - share) * images[labels_b]
    assert np.abs(mixed - expected).max() <= 0.5
    assert np.array_equal(labels_b, np.arange(50) ^ 1)
    assert np.array_equal(lam[0::2], lam[1::2])
    assert len(np.unique(lam)) > 15


def test_cutmix_keeps_exactly_the_share_that_lam_says():
    images, labels, indices = batch(60, channels=1)
    images[:] = np.where(np.arange(60) % 2, 255, 0)[:, None, None, None]
    mixed = images.copy()
    labels_b, lam = mix_batch(mixed, labels, indices, Mix(cutmix=1.0), 0, 0)
    kept = (mixed == images).mean(axis=(1, 2, 3))
    assert np.array_equal(kept.astype(np.float32), lam)
    assert np.array_equal(labels_b, np.arange(60) ^ 1)
    for changed in (mixed != images)[..., 0]:
        rows, columns = changed.any(axis=1), changed.any(axis=0)
        assert changed.sum() == rows.sum() * columns.sum()


def test_an_odd_last_example_stays_as_it_is():
    images, labels, indices = batch(5)
    mixed = images.copy()
    labels_b, lam = mix_batch(mixed, labels, indices, Mix(mixup=1.0), 0, 0)
    assert np.array_equal(mixed[4], images[4])
    assert labels_b[4] == labels[4]
    assert lam[4] == 1


def test_no_mix_changes_nothing():
    images, labels, indices = batch(6)
    mixed = images.copy()
    labels_b, lam = mix_batch(mixed, labels, indices, Mix(), 0, 0)
    assert np.array_equal(mixed, images)
    assert np.array_equal(labels_b, labels)
    assert np.array_equal(lam, np.ones(6))


def test_with_both_on_about_half_of_the_pairs_are_blended():
    images, labels, indices = batch(2000, 8, 8, 1)
    images[:] = np.where(np.arange(2000) % 2, 255, 0)[:, None, None, None]
    mix_batch(images, labels, indices, Mix(mixup=1.0, cutmix=1.0), 0, 0)
    blended = ((images != 0) & (images != 255)).any(axis=(1, 2, 3))[::2]
    assert 0.44 < blended.mean() < 0.56


def test_epochs_and_seeds_mix_differently():
    images, labels, indices = batch(40)
    lams = [
        mix_batch(images.copy(), labels, indices, Mix(mixup=1.0), seed, epoch)[1]
        for seed, epoch in [(0, 0), (0, 1), (1, 0)]
    ]
    assert np.mean(lams[0] == lams[1]) < 0.2
    assert np.mean(lams[0] == lams[2]) < 0.2


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5, 1.0, 4.0, 300.0])
def test_shares_follow_the_beta_distribution(alpha):
    from scipy import stats

    images = np.zeros((20_000, 1, 1, 1), np.uint8)
    labels = np.zeros(20_000, np.int32)
    _, lam = mix_batch(images, labels, np.arange(20_000), Mix(mixup=alpha), 0, 0)
    shares = lam[::2]
    # Shares are whole 256ths, so the distributions are compared between them.
    edges = (np.arange(256) + 0.5) / 256
    empirical = np.searchsorted(np.sort(shares), edges) / len(shares)
    assert np.abs(empirical - stats.beta(alpha, alpha).cdf(edges)).max() < 1.95 / np.sqrt(len(shares))


def test_a_negative_alpha_is_refused():
    with pytest.raises(ConfigError, match=r"mix\.mixup=-0\.1"):
        Mix(mixup=-0.1)
