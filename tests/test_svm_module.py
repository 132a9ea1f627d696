import copy

import gpytorch
import numpy as np
import pytest
import torch
from gpytorch.kernels import MaternKernel
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.svm import SVC
from torch.autograd import gradcheck

from torchdnr.files import CheckpointError, DamagedFileError, save_tensors
from torchdnr.kernels import scale_gamma
from torchdnr.svm import RBFSVM, ConvergenceWarning, NotFittedError

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
FITTED = ("support_vectors", "dual_coef", "intercept", "center")


def split(name, n=350, unseen=150):
    """Return training features and labels, and features of unseen samples; all float64."""
    x, y = {"digits": load_digits, "breast_cancer": load_breast_cancer}[name](return_X_y=True)
    x = x / 16 if name == "digits" else (x - x.mean(0)) / x.std(0)
    x, y = torch.tensor(x), torch.tensor(y)
    return x[:n], y[:n], x[n : n + unseen]


def small(dtype=torch.float64, n=40, c=3):
    """Return a small noisy problem, far from separable, with some margin violators."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.arange(n) % c


def one_vs_rest_svc(x, y, unseen, **options):
    """Return scikit-learn's decision values of the unseen samples, one column per class."""
    fits = [SVC(tol=1e-6, **options).fit(x, np.where(y == k, 1, -1)) for k in range(y.max() + 1)]
    return torch.tensor(np.stack([svc.decision_function(unseen) for svc in fits], axis=1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gamma", ["scale", 0.07])
@pytest.mark.parametrize("C", [0.5, 20.0])
@pytest.mark.parametrize("name", ["digits", "breast_cancer"])
def test_scores_of_unseen_samples_are_those_of_scikit_learn(name, C, gamma, device):
    x, y, unseen = split(name)
    expected = one_vs_rest_svc(x.numpy(), y.numpy(), unseen.numpy(), C=C, gamma=gamma)
    exact = RBFSVM(C, gamma).fit(x.to(device), y.to(device))(unseen.to(device)).cpu()
    rough = RBFSVM(C, gamma).fit(x.to(device).float(), y.to(device))(unseen.to(device).float())
    assert exact.dtype == torch.float64 and rough.dtype == torch.float32
    assert exact.shape == expected.shape
    assert (exact - expected).abs().max() < 2e-3
    assert (rough.cpu().double() - exact).abs().max() < 1e-3


def test_attributes_have_the_promised_shapes_and_meaning():
    x, y, _ = split("digits")
    svm = RBFSVM(C=5.0).fit(x, y)
    m = len(svm.support_vectors)
    assert 0 < m < len(x)
    assert svm.support_vectors.shape == (m, 64)
    assert svm.dual_coef.shape == (m, 10) and svm.intercept.shape == (10,)
    assert svm.is_fitted and svm.num_classes == 10
    assert (svm.dual_coef.abs().sum(1) > 0).all()  # the union: each supports some class
    torch.testing.assert_close(svm.dual_coef.sum(0), torch.zeros(10).double(), atol=1e-9, rtol=0)
    assert svm.dual_coef.abs().max() <= 5.0
    torch.testing.assert_close(svm.center, x.mean(0))
    gamma = 0.5 / svm.kernel.lengthscale.square()
    assert gamma.item() == pytest.approx(scale_gamma(x), rel=1e-5)
    for field in ("violation", "duality_gap", "objective", "steps", "converged"):
        assert getattr(svm.solution, field).shape == (10,)
    assert svm.solution.samples == len(x)
    assert svm.solution.converged.all() and (svm.solution.violation <= 1e-3).all()


def test_labels_may_lack_no_class_but_num_classes_may_name_them():
    x, y = small()
    assert RBFSVM().fit(x, y, num_classes=3).num_classes == 3
    with pytest.raises(ValueError, match=r"all of 0\.\.4, got none of \[3, 4\]"):
        RBFSVM().fit(x, y, num_classes=5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saved_module_scores_exactly_as_before(tmp_path, dtype):
    x, y, unseen = split("digits")
    svm = RBFSVM(C=3.0, gamma=0.123).fit(x.to(dtype), y)
    svm.save(tmp_path / "svm.safetensors")
    loaded = RBFSVM.load(tmp_path / "svm.safetensors")
    assert torch.equal(loaded(unseen.to(dtype)), svm(unseen.to(dtype)))
    assert loaded.settings() == svm.settings()
    for name, tensor in svm.state_dict().items():
        assert loaded.state_dict()[name].dtype == tensor.dtype, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_state_dict_fits_any_module_of_its_kind(dtype):
    x, y, unseen = split("digits")
    svm, unseen = RBFSVM(C=3.0).fit(x.to(dtype), y), unseen.to(dtype)
    unfitted = RBFSVM()
    unfitted.load_state_dict(svm.state_dict())
    assert torch.equal(unfitted(unseen), svm(unseen))
    other = RBFSVM().fit(*small(dtype))
    other.load_state_dict(svm.state_dict())
    assert torch.equal(other(unseen), svm(unseen))
    assert other.solution is None  # the certificate was that of the machine before
    svm.load_state_dict(RBFSVM().state_dict())
    assert not svm.is_fitted


def test_a_fitted_module_keeps_its_dtype_when_another_state_is_loaded():
    x, y, unseen = split("digits")
    svm = RBFSVM(C=3.0).fit(x, y)
    other = RBFSVM().fit(*small(torch.float32))
    other.load_state_dict(svm.state_dict())
    dtypes = {name: tensor.dtype for name, tensor in other.state_dict().items()}
    assert dtypes.pop("support") == torch.int64
    assert set(dtypes.values()) == {torch.float32}
    torch.testing.assert_close(other(unseen.float()).double(), svm(unseen), atol=1e-4, rtol=0)


def test_copies_and_conversions():
    x, y, unseen = split("digits")
    svm = RBFSVM(C=3.0).fit(x.float(), y)
    before = svm(unseen.float())
    twin = copy.deepcopy(svm)
    assert torch.equal(twin(unseen.float()), before)
    wide = copy.deepcopy(svm).to(torch.float64)
    assert wide(unseen).dtype == torch.float64
    torch.testing.assert_close(wide(unseen).float(), before, atol=1e-4, rtol=0)
    twin.fit(*small(torch.float32))
    assert torch.equal(svm(unseen.float()), before)  # the original does not share the copy's state


@pytest.mark.parametrize("nu", [0.5, 1.5, 2.5])
def test_a_matern_kernel_of_gpytorch_gives_the_svc_on_its_gram_matrix(nu):
    x, y, unseen = split("digits", n=250, unseen=80)
    kernel = gpytorch.kernels.MaternKernel(nu=nu).double()
    kernel.lengthscale = 2.5
    with torch.no_grad():
        gram, cross = kernel(x).to_dense().numpy(), kernel(unseen, x).to_dense().numpy()
    expected = one_vs_rest_svc(gram, y.numpy(), cross, kernel="precomputed", C=2.0)
    svm = RBFSVM(2.0, kernel=kernel).fit(x, y)
    assert svm.kernel is kernel
    with torch.no_grad():
        assert (svm(unseen) - expected).abs().max() < 2e-3


def test_a_module_with_a_kernel_of_gpytorch_is_saved_with_it(tmp_path):
    x, y = small()
    kernel = gpytorch.kernels.MaternKernel(nu=2.5)
    kernel.lengthscale = 1.7
    svm = RBFSVM(2.0, kernel=kernel).fit(x, y)
    svm.save(tmp_path / "svm.safetensors")
    fresh = gpytorch.kernels.MaternKernel(nu=2.5)
    loaded = RBFSVM.load(tmp_path / "svm.safetensors", kernel=fresh)
    assert torch.equal(loaded(x), svm(x))
    assert torch.equal(copy.deepcopy(svm)(x), svm(x))
    for wrong in (None, gpytorch.kernels.RQKernel()):
        with pytest.raises(CheckpointError, match="expected kernel=MaternKernel"):
            RBFSVM.load(tmp_path / "svm.safetensors", kernel=wrong)
    RBFSVM().fit(x, y).save(tmp_path / "rbf.safetensors")
    with pytest.raises(CheckpointError, match="expected kernel=None"):
        RBFSVM.load(tmp_path / "rbf.safetensors", kernel=fresh)


def test_lower_precision_does_not_reach_a_kernel_of_gpytorch_either():
    x, y = small(torch.float32)
    svm = RBFSVM(50.0, kernel=gpytorch.kernels.MaternKernel(nu=1.5)).fit(x, y)
    with torch.no_grad():
        expected = svm(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(svm(x), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_tend_to_the_intercept_far_from_the_data(dtype, device):
    x, y = small(dtype)
    svm = RBFSVM().fit(x.to(device), y.to(device))
    directions = torch.nn.functional.normalize(torch.randn(20, 4, dtype=dtype, device=device))
    gaps = [(svm(svm.center + r * directions) - svm.intercept).abs().max() for r in (1.0, 4.0, 8.0)]
    assert gaps[0] > gaps[1] > gaps[2]
    assert torch.equal(svm(1e3 * directions), svm.intercept.expand(20, 3))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 2e-4), (torch.float64, 1e-11)])
def test_a_score_does_not_depend_on_the_rest_of_its_batch(dtype, tol, device):
    x, y, unseen = (t.to(device) for t in split("breast_cancer"))
    svm, unseen = RBFSVM(C=10.0).fit(x.to(dtype), y), unseen.to(dtype)
    together = svm(unseen)
    for row in (0, 17):
        alone = svm(unseen[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], atol=tol, rtol=0)
        beside_an_outlier = svm(torch.stack([unseen[row], torch.full_like(unseen[row], 1e4)]))
        torch.testing.assert_close(beside_an_outlier[0], together[row], atol=tol, rtol=0)
    assert svm(unseen[:0]).shape == (0, 2)


@pytest.mark.parametrize("kernel", [None, gpytorch.kernels.MaternKernel(nu=2.5)])
def test_gradients_by_the_features_pass_gradcheck(kernel):
    x, y = small()
    svm = RBFSVM(kernel=kernel).fit(x, y)
    z = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(svm, z)
    at_a_support_vector = svm.support_vectors[:2].clone().requires_grad_()
    svm(at_a_support_vector).sum().backward()
    assert at_a_support_vector.grad.isfinite().all() and at_a_support_vector.grad.abs().max() > 0


def test_features_with_a_gradient_may_be_fitted_on():
    x, y = small()
    svm = RBFSVM().fit(x.clone().requires_grad_(), y)
    assert torch.equal(svm(x), RBFSVM().fit(x, y)(x))
    assert not any(tensor.requires_grad for tensor in svm.state_dict().values())


def test_fitting_again_replaces_everything():
    x, y = small()
    svm = RBFSVM(gamma="scale").fit(10 * x[:30, :2], y[:30])
    assert torch.equal(svm.fit(x, y)(x), RBFSVM(gamma="scale").fit(x, y)(x))


def test_too_few_steps_are_named_in_a_warning():
    x, y = small()
    with pytest.warns(ConvergenceWarning, match="3 of 3 dual problems did not reach"):
        svm = RBFSVM(C=100.0, max_steps=2).fit(x, y)
    assert not svm.solution.converged.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x, y * 0), "at least two classes"),
        (lambda x, y: (x, y * 2), r"all of 0\.\.4, got none of \[1, 3\]"),
        (lambda x, y: (x, y - 1), r"labels must be in 0\.\.1, got -1\.\.1"),
        (lambda x, y: (x, y.double()), r"labels must be integers .* call \.long\(\) first"),
        (lambda x, y: (x, y[:-1]), r"labels must be \(40,\), one per sample, got \(39,\)"),
        (lambda x, y: (x, y.unsqueeze(1)), r"labels must be \(40,\)"),
        (lambda x, y: (x * torch.nan, y), "features must be finite"),
        (lambda x, y: (x / 0, y), "features must be finite"),
        (lambda x, y: (x.unsqueeze(2), y), r"features must be \(n, d\)"),
        (lambda x, y: (x[:0], y[:0]), r"n, d >= 1, got \(0, 4\)"),
        (lambda x, y: (x.long(), y), "float32 or float64, got torch.int64"),
    ],
)
def test_wrong_training_data_is_refused_and_changes_nothing(change, message):
    x, y = small()
    svm = RBFSVM().fit(x, y)
    before = svm(x)
    with pytest.raises(ValueError, match=message):
        svm.fit(*change(x, y))
    assert torch.equal(svm(x), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"C": 0.0}, "C must be > 0"),
        ({"C": float("nan")}, "C must be > 0"),
        ({"gamma": -1.0}, "gamma must be a number > 0"),
        ({"gamma": "automatic"}, "gamma must be .* 'automatic'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RBFSVM(**options)


def test_scoring_needs_a_fit_and_as_many_features(tmp_path):
    x, y = small()
    with pytest.raises(NotFittedError, match=r"call fit\(features, labels\)"):
        RBFSVM()(x)
    with pytest.raises(NotFittedError, match="is not fitted"):
        RBFSVM().save(tmp_path / "svm.safetensors")
    assert not (tmp_path / "svm.safetensors").exists()
    svm = RBFSVM().fit(x, y)
    for wrong in (x[:, :3], x[0]):
        with pytest.raises(ValueError, match=r"features must be \(n, 4\) as in fit"):
            svm(wrong)


def test_options_given_as_numpy_numbers_can_be_saved(tmp_path):
    svm = RBFSVM(np.float32(2.0), np.float32(0.5)).fit(*small())
    svm.save(tmp_path / "svm.safetensors")
    assert RBFSVM.load(tmp_path / "svm.safetensors").settings() == svm.settings()


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path, svm = tmp_path / "svm.safetensors", RBFSVM().fit(*small())
    svm.save(path)
    good = path.read_bytes()
    for bad in (good[:-9], good[:-9] + bytes(9), b"no safetensors", b""):
        path.write_bytes(bad)
        with pytest.raises(DamagedFileError, match=r"svm\.safetensors"):
            RBFSVM.load(path)
    save_tensors(path, svm.state_dict(), {}, kind="network")
    with pytest.raises(CheckpointError, match="expected a RBFSVM file, got a network file"):
        RBFSVM.load(path)
    with pytest.raises(FileNotFoundError, match="no RBFSVM file here"):
        RBFSVM.load(tmp_path / "missing")


def test_a_failed_save_leaves_the_earlier_file_as_it_was(tmp_path, monkeypatch):
    path, svm = tmp_path / "svm.safetensors", RBFSVM().fit(*small())
    svm.save(path)
    good = path.read_bytes()
    with pytest.raises(OSError, match="choose a writable folder"):
        svm.save(path / "below_a_file")

    def full_disk(tensors, file, **_):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.serialize_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        svm.save(path)
    assert path.read_bytes() == good
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_kernel_with_other_hidden_options_is_refused_on_load(tmp_path):
    features, labels = torch.randn(40, 3), torch.arange(40) % 2
    svm = RBFSVM(kernel=MaternKernel(nu=2.5)).fit(features, labels)
    svm.save(tmp_path / "svm.safetensors")
    assert torch.equal(
        RBFSVM.load(tmp_path / "svm.safetensors", kernel=MaternKernel(nu=2.5))(features),
        svm(features),
    )
    with pytest.raises(CheckpointError, match="other values"):
        RBFSVM.load(tmp_path / "svm.safetensors", kernel=MaternKernel(nu=0.5))
    with pytest.raises(CheckpointError, match="got others"):
        RBFSVM.load(tmp_path / "svm.safetensors", kernel=MaternKernel(nu=2.5, ard_num_dims=3))
