import pytest
import torch

from mmpeft.composition.sum import weighted_sum
from mmpeft.composition.zip import zip_columns
from mmpeft.delta import LowRank
from mmpeft.errors import ConfigError


def coefficients(result, terms):
    """Read each change's column coefficients back from the result's rows, (n, in)."""
    columns, at = [], 0
    for delta, _ in terms:
        rows = result.lora_A[at : at + delta.rank]
        columns.append((rows * delta.lora_A).sum(0) / delta.lora_A.square().sum(0))
        at += delta.rank
    return torch.stack(columns)


def missed(result, terms):
    """Relative error of each adapter's output on the inputs that it reads, in dense matrices."""
    errors = []
    for delta, weight in terms:
        change = weight * delta.dense().flatten(1).double()
        probes = delta.dense().flatten(1).double().T
        errors.append(
            float(((result.dense().flatten(1).double() - change) @ probes).norm() / (change @ probes).norm())
        )
    return torch.tensor(errors, dtype=torch.float64)


def objective(columns, terms, stiffness, overlap):
    """The docstring's formula in dense matrices, float64."""
    matrices = [weight * delta.dense().flatten(1).double() for delta, weight in terms]
    merged = sum(matrix * column for matrix, column in zip(matrices, columns, strict=True))
    value = stiffness * (columns - 1).square().sum() / columns.shape[1]
    for matrix, (delta, _) in zip(matrices, terms, strict=True):
        probes = delta.dense().flatten(1).double().T
        value = value + ((merged - matrix) @ probes).square().sum() / (matrix @ probes).square().sum()
    pairs = [(i, j) for i in range(len(terms)) for j in range(i)]
    shared = sum((columns[i] @ columns[j]).abs() for i, j in pairs)
    return value + overlap * shared / len(pairs) / columns.shape[1]


@pytest.fixture
def crowded(low_rank):
    """Three changes that read partly the same inputs."""
    common = low_rank((8, 12), 2, 50).lora_A
    parts = [low_rank((8, 12), 2, seed) for seed in range(3)]
    return [
        (LowRank(part.lora_B, part.lora_A + common, (8, 12)), weight)
        for part, weight in zip(parts, (1.0, 0.7, -0.5), strict=True)
    ]


@pytest.mark.parametrize(("stiffness", "overlap"), [(0.3, 0.01), (0.05, 0.0), (1.0, 0.3)])
def test_the_coefficients_minimise_the_stated_objective(crowded, stiffness, overlap):
    result = zip_columns(crowded, stiffness=stiffness, overlap=overlap)
    columns = coefficients(result, crowded).double().requires_grad_()
    found = objective(columns, crowded, stiffness, overlap)
    (slope,) = torch.autograd.grad(found, columns)
    start = torch.ones_like(columns).requires_grad_()
    (start_slope,) = torch.autograd.grad(objective(start, crowded, stiffness, overlap), start)
    assert slope.norm() < 1e-3 * start_slope.norm()
    assert found < objective(torch.ones_like(columns), crowded, stiffness, overlap)


def test_each_adapter_answers_its_own_inputs_better_than_in_the_sum(crowded):
    assert (missed(zip_columns(crowded), crowded) < missed(weighted_sum(crowded), crowded)).all()


def test_the_result_stays_low_rank_without_building_a_matrix(crowded, monkeypatch):
    def dense(self):
        raise AssertionError("built the dense matrix")

    monkeypatch.setattr(LowRank, "dense", dense)
    assert zip_columns(crowded).rank == 6


def test_changes_that_read_inputs_of_their_own_are_summed():
    one = LowRank(torch.ones(5, 1), torch.tensor([[1.0, 2.0, 0.0, 0.0]]), (5, 4))
    other = LowRank(torch.ones(5, 1), torch.tensor([[0.0, 0.0, -1.0, 3.0]]), (5, 4))
    terms = [(one, 1.0), (other, 0.5)]
    result = zip_columns(terms, overlap=0.0)
    torch.testing.assert_close(result.dense(), weighted_sum(terms).dense(), rtol=1e-4, atol=1e-4)


def test_the_same_change_twice_answers_its_inputs_about_once(low_rank):
    one = low_rank((8, 12), 2, 0)
    terms = [(one, 1.0), (one, 1.0)]
    assert missed(weighted_sum(terms), terms).min() > 0.99
    assert missed(zip_columns(terms, stiffness=0.01, overlap=0.0), terms).max() < 0.05


def test_a_stiff_zip_is_the_sum(crowded):
    result = zip_columns(crowded, stiffness=1e6)
    torch.testing.assert_close(result.dense(), weighted_sum(crowded).dense(), rtol=1e-3, atol=1e-3)


def test_it_works_where_gradients_are_switched_off(crowded):
    expected = zip_columns(crowded).dense()
    with torch.inference_mode():
        assert torch.equal(zip_columns(crowded).dense(), expected)


@pytest.mark.parametrize("settings", [{"stiffness": 0.0}, {"overlap": -1.0}, {"steps": 0}])
def test_settings_out_of_range_are_refused(crowded, settings):
    with pytest.raises(
        ConfigError, match="zip needs stiffness above 0, overlap of at least 0 and steps of at least 1"
    ):
        zip_columns(crowded, **settings)
