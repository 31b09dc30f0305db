import numpy as np
import pytest
import scipy.linalg
import torch

import data
import fid
from runtime import UserError


def stats(x):
    return fid.Statistics(x.shape[1]).update(x).result()


def test_closed_forms():
    """Equal covariance: the squared distance of the means. Commuting covariances: sum of (sqrt a - sqrt b)^2."""
    d, rng = 5, np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(d, d)))[0]
    a, b = rng.uniform(0.1, 3, d), rng.uniform(0.1, 3, d)
    A, B, m = q @ np.diag(a) @ q.T, q @ np.diag(b) @ q.T, rng.normal(size=d)
    assert fid.frechet_distance(m, A, 0 * m, A) == pytest.approx((m ** 2).sum(), rel=1e-12)
    assert fid.frechet_distance(m, A, m, B) == pytest.approx(((a ** 0.5 - b ** 0.5) ** 2).sum(), rel=1e-10)
    assert abs(fid.frechet_distance(m, A, m, A)) < 1e-9


def test_equals_scipy_and_takes_singular_covariances():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(300, 8)), 0.5 + rng.normal(size=(300, 8)) @ rng.normal(size=(8, 8))
    (m1, s1), (m2, s2) = ((v.mean(0), np.cov(v.T)) for v in (x, y))
    want = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2) - 2 * np.trace(scipy.linalg.sqrtm(s1 @ s2)).real
    assert fid.frechet_distance(m1, s1, m2, s2) == pytest.approx(want, rel=1e-9)
    x[:, 3], y[:, 3] = 2.0, 2.0  # a constant feature
    s1, s2 = np.cov(x.T), np.cov(y.T)
    keep = [0, 1, 2, 4, 5, 6, 7]
    without = fid.frechet_distance(x[:, keep].mean(0), s1[np.ix_(keep, keep)], y[:, keep].mean(0), s2[np.ix_(keep, keep)])
    assert fid.frechet_distance(x.mean(0), s1, y.mean(0), s2) == pytest.approx(without, rel=1e-9)


def test_streaming_statistics():
    x = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    s = fid.Statistics(6)
    for part in x.split(17):
        s.update(part)
    mean, cov = s.result()
    np.testing.assert_allclose(mean, x.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(x.double().numpy().T), rtol=1e-10)
    with pytest.raises(UserError):
        stats(x[:1])


@pytest.mark.parametrize("name", ["digits-cnn", "digits-mlp"])
def test_digits_features(name):
    """Real halves are near one another, noise is far, wrong labels are seen; the network knows the held-out digits."""
    real = data.digits()
    half = fid.evaluate(real.x[:900], real.y[:900], name)
    noise = fid.evaluate(torch.randint(0, 256, (900, 1, 8, 8), dtype=torch.uint8), real.y[:900], name)
    assert half["fd"] < 6 and noise["fd"] > 10 * half["fd"] and noise["pixel_fd"] > 10 * half["pixel_fd"]
    assert fid.evaluate(real.x[1437:], real.y[1437:], name)["accuracy"] > 0.9
    assert fid.evaluate(real.x[1437:], (real.y[1437:] + 1) % 10, name)["accuracy"] < 0.1
    with pytest.raises(UserError):
        fid.load_features("inception")
