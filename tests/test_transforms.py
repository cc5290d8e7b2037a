"Target transforms against scikit-learn's scalers and pandas, and their inverses over wide ranges."
import json

import numpy as np
import pandas as pd
import pytest
from sklearn.preprocessing import MinMaxScaler, StandardScaler

from aam.config import AamError, target_transform_names
from aam.transforms import TargetTransform, make_transform

@pytest.fixture
def targets():
    "(40, 3): weeks, a wide range from 0, a constant; a fifth of the first column is missing."
    rng = np.random.default_rng(1)
    values = np.column_stack([rng.uniform(9, 112, 40), np.append(rng.lognormal(0, 5, 39), 0), np.full(40, 7.)])
    values[::5, 0] = np.nan
    return values

seasons = np.array(['spring', 'summer', 'autumn', 'winter'], dtype=object)[np.arange(40) % 3]

@pytest.mark.parametrize('name,scaler,log', [
    ('minmax', MinMaxScaler, False), ('zscore', StandardScaler, False), ('log-minmax', MinMaxScaler, True), ('log-zscore', StandardScaler, True)])
def test_as_sklearn(targets, name, scaler, log):
    logged = np.log1p(targets) if log else targets
    np.testing.assert_allclose(make_transform(name).fit(targets).encode(targets), scaler().fit_transform(logged), rtol=1e-12, atol=1e-12)

def test_by_category_as_pandas(targets):
    grouped = pd.DataFrame(targets[:, :2]).groupby(seasons)
    expected = (targets[:, :2] - grouped.transform('mean')) / grouped.transform('std', ddof=0)
    np.testing.assert_allclose(make_transform('zscore-category').fit(targets[:, :2], seasons).encode(targets[:, :2], seasons), expected)

@pytest.mark.parametrize('name', target_transform_names)
def test_decode(targets, name):
    transform = make_transform(name).fit(targets, seasons)
    transform = TargetTransform.from_dict(json.loads(json.dumps(transform.to_dict())))
    encoded = transform.encode(targets, seasons)
    np.testing.assert_allclose(transform.decode(encoded, seasons), targets, rtol=1e-9, atol=1e-9)
    # each quantile as if it were alone, fp32 as a model gives it, and outside of [0, 1]
    quantiles = np.random.default_rng(2).normal(.5, 2, (40, 3, 5)).astype(np.float32)
    together = transform.decode(quantiles, seasons)
    for q in range(5): np.testing.assert_array_equal(together[..., q], transform.decode(quantiles[..., q], seasons))
    assert (np.diff(transform.decode(np.sort(quantiles, axis=-1), seasons), axis=-1) >= 0).all()
    # a sample's value does not depend on the others
    np.testing.assert_array_equal(transform.decode(quantiles[7:8], seasons[7:8]), together[7:8])

def test_wide_range_inverse():
    values = np.concatenate([[0], np.logspace(-6, 9, 200)])[:, None]
    for name in ('log-minmax', 'log-zscore'):
        transform = make_transform(name).fit(values)
        np.testing.assert_allclose(transform.decode(transform.encode(values)), values, rtol=1e-9, atol=1e-14)

def test_categories_that_fall_back():
    values, categories = np.array([[1.], [3.], [50.], [9.], [9.], [np.nan]]), ['a', 'a', 'single', 'equal', 'equal', 'no value']
    transform = make_transform('zscore-category').fit(values, categories)
    plain = make_transform('zscore').fit(values)
    for category in ('single', 'no value', 'unseen', None, np.nan, pd.NA):
        assert transform.encode([[5.]], [category]) == plain.encode([[5.]])
        assert transform.decode([[.5]], [category]) == plain.decode([[.5]])
    assert transform.encode([[9.]], ['equal']) == 0
    assert transform.encode([[9. + plain.scale[0]]], ['equal']) == pytest.approx(1)

def test_refusals():
    with pytest.raises(AamError, match=r"negative values in column 'b' \(s1: -1, s2: -3\)"):
        make_transform('log-zscore').fit([[1., 2.], [3., -1.], [4., -3.]], sample_ids=['s0', 's1', 's2'], columns=['a', 'b'])
    fitted = make_transform('log-minmax').fit([[1.], [2.]])
    with pytest.raises(AamError, match='row 0: -5'): fitted.encode([[-5.]])
    with pytest.raises(AamError, match='target b has no value'): make_transform('minmax').fit([[1., np.nan]], columns=['a', 'b'])
    with pytest.raises(AamError, match='needs the category'): make_transform('zscore-category').fit([[1.], [2.]])
    with pytest.raises(ValueError, match='fitted on 1'): fitted.decode([[1., 2.]])
