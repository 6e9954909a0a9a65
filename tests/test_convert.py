"""The network, the optimizer and the initial weights compared with Keras; conversion in both directions."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command
from helpers import assert_same

from mnist_lit import UserError
from mnist_lit.convert import KERAS, convert, from_keras, keras_tutorial, load_checkpoint, to_keras
from mnist_lit.inference.trained import load
from mnist_lit.model import MNISTClassifier

FORMATS = ["channels_last", "channels_first"]


keras: Any = None


@pytest.fixture(autouse=True)
def keras_seed() -> None:
    global keras
    import keras  # slow, so only in the process that runs these tests

    keras.utils.set_random_seed(7)


def images_for(keras_model: Any, images: torch.Tensor) -> np.ndarray:
    """Images [N, 1, 28, 28] in the layout of the Keras model."""
    return images.numpy().reshape(len(images), *keras_model.input_shape[1:])


@pytest.mark.parametrize("data_format", FORMATS)
def test_same_weights_give_the_same_probabilities(data_format: str, sample) -> None:
    keras_model = keras_tutorial(data_format)
    # New weights give nearly uniform probabilities, which would hide a wrong order: scale them up.
    keras_model.set_weights([weights * 3 for weights in keras_model.get_weights()])
    images, _ = next(iter(sample.test_dataloader()))
    theirs = keras_model.predict(images_for(keras_model, images), verbose=0)
    with torch.no_grad():
        ours = from_keras(keras_model).eval()(images).numpy()
    assert theirs.std(axis=0).max() > 0.01
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.fixture
def double_precision() -> Iterator[None]:
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


def test_twenty_steps_of_adadelta_match_keras(double_precision, sample) -> None:
    """In double precision, since twenty steps of Adadelta amplify single-precision rounding errors a hundredfold.

    The remaining difference is due to Keras, which still multiplies matrices in single precision.
    """
    keras_model = keras_tutorial(dropout=0.0)
    keras_model.set_weights([weights.astype(np.float32) for weights in keras_model.get_weights()])
    keras_model.compile(
        optimizer=keras.optimizers.Adadelta(learning_rate=1.0, rho=0.95, epsilon=1e-7),
        loss=keras.losses.categorical_crossentropy,
    )
    classifier = from_keras(keras_model).double().train()
    optimizer = classifier.configure_optimizers()
    batches = itertools.islice(itertools.cycle(sample.train_dataloader()), 20)
    for step, (images, labels) in enumerate(batches):
        images, labels = images[:32].double(), labels[:32]  # double precision is slow
        one_hot = keras.utils.to_categorical(labels.numpy(), 10)
        their_loss = keras_model.train_on_batch(images_for(keras_model, images), one_hot)
        loss = classifier.training_step((images, labels), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(float(their_loss), rel=1e-5), f"step {step}"
    theirs = from_keras(keras_model).network.state_dict()
    for name, weights in classifier.network.state_dict().items():
        torch.testing.assert_close(weights, theirs[name].double(), rtol=0, atol=1e-4)


def test_initial_weights_follow_keras_distributions() -> None:
    torch.manual_seed(0)
    ours = dict(MNISTClassifier().network.named_parameters())
    theirs = dict(from_keras(keras_tutorial()).network.named_parameters())
    fans = {"conv1": 9 + 9 * 32, "conv2": 9 * 32 + 9 * 64, "dense1": 4096 + 250, "dense2": 250 + 10}
    for name, fan_sum in fans.items():
        bound = (6 / fan_sum) ** 0.5
        for weights in (ours[f"{name}.weight"], theirs[f"{name}.weight"]):
            count = weights.numel()
            deviation = bound / 3**0.5
            assert 0.97 * bound < weights.abs().max() <= bound
            assert abs(weights.mean()) < 4 * deviation / count**0.5
            # The mean square of n uniform values on [-b, b] has the variance 4/45 b^4 / n.
            assert abs((weights**2).mean() - deviation**2) < 4 * (4 / 45 / count) ** 0.5 * bound**2
        assert not ours[f"{name}.bias"].any() and not theirs[f"{name}.bias"].any()


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("ending", KERAS)
def test_a_keras_file_goes_to_a_checkpoint_and_back_bit_for_bit(
    ending: str, data_format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = keras_tutorial(data_format, dropout=0.25)
    only_weights = ending == ".weights.h5"
    (original.save_weights if only_weights else original.save)(tmp_path / f"model{ending}")
    convert(str(tmp_path / f"model{ending}"), str(tmp_path / "model.ckpt"))
    assert ("weights only: taken for the tutorial's network" in capsys.readouterr().out) == only_weights
    converted = load_checkpoint(tmp_path / "model.ckpt").network
    assert_same(converted.state_dict(), from_keras(original).network.state_dict())
    convert(str(tmp_path / "model.ckpt"), str(tmp_path / f"back{ending}"), data_format=data_format)
    if only_weights:
        back = keras_tutorial(data_format, dropout=0.5)
        back.load_weights(tmp_path / f"back{ending}")
    else:
        back = keras.saving.load_model(tmp_path / f"back{ending}")
        assert back.layers[4].rate == 0.25
    for ours, theirs in zip(back.get_weights(), original.get_weights(), strict=True):
        assert_same(ours, theirs)
    assert back.input_shape == original.input_shape
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"back{ending}", "model.ckpt", f"model{ending}"]


@pytest.fixture(params=["mixed_float16", "mixed_bfloat16"])
def mixed_precision(request: pytest.FixtureRequest) -> Iterator[str]:
    keras.mixed_precision.set_global_policy(request.param)
    yield request.param
    keras.mixed_precision.set_global_policy("float32")


@pytest.mark.parametrize("ending", KERAS)
def test_a_model_of_mixed_precision_has_single_precision_weights(
    mixed_precision: str, ending: str, tmp_path: Path
) -> None:
    original = keras_tutorial()
    original.set_weights([weights * 3 for weights in original.get_weights()])
    assert original.get_layer("conv1").compute_dtype == mixed_precision.removeprefix("mixed_")
    (original.save_weights if ending == ".weights.h5" else original.save)(tmp_path / f"model{ending}")
    convert(str(tmp_path / f"model{ending}"), str(tmp_path / "model.ckpt"))
    found = load_checkpoint(tmp_path / "model.ckpt")
    for ours in (to_keras(found), to_keras(from_keras(original))):
        assert_same(ours.get_weights(), original.get_weights())


def test_what_keras_writes_is_read_back(monkeypatch: pytest.MonkeyPatch, finished_run: Path, tmp_path: Path) -> None:
    save = keras.Model.save
    monkeypatch.setattr(keras.Model, "save", lambda _, path: save(keras_tutorial(), path))  # with other weights
    with pytest.raises(UserError, match=r"model\.h5: Keras has written other weights"):
        convert(str(finished_run / "checkpoints" / "last.ckpt"), str(tmp_path / "model.h5"))
    assert not [*tmp_path.iterdir()]


def test_a_runs_checkpoint_goes_to_keras_and_back_bit_for_bit(finished_run: Path, tmp_path: Path) -> None:
    source = finished_run / "checkpoints" / "last.ckpt"
    convert(str(source), str(tmp_path / "model.keras"))
    convert(str(tmp_path / "model.keras"), str(tmp_path / "model.ckpt"))
    original, back = (
        MNISTClassifier.load_from_checkpoint(source),
        MNISTClassifier.load_from_checkpoint(tmp_path / "model.ckpt"),
    )
    for name, weights in original.network.state_dict().items():
        assert_same(weights, back.network.state_dict()[name])
    assert back.trained_on == [{"name": "unknown"}]


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "none"])
def test_keras_own_settings_do_not_matter(backend: str, finished_run: Path, tmp_path: Path, command: Command) -> None:
    """Nor does it that its backend is not installed."""
    settings = {"backend": "tensorflow", "floatx": "float16", "image_data_format": "channels_first"}
    (tmp_path / "keras.json").write_text(json.dumps(settings))
    environment = {"KERAS_BACKEND": backend, "KERAS_HOME": str(tmp_path)}
    for source, target in (
        (finished_run / "checkpoints" / "last.ckpt", "model.keras"),
        ("model.keras", "model.ckpt"),
    ):
        done = command(f"source={source}", f"target={target}", cwd=tmp_path, verb="convert", environment=environment)
        assert done.returncode == 0, done.stderr
        assert "WARNING" not in done.stderr


def test_a_model_whose_flatten_keeps_the_channels_first_is_converted_too(tmp_path: Path) -> None:
    layers = keras.layers
    first = {"data_format": "channels_first"}
    keras_model = keras.Sequential(
        [
            keras.Input((1, 28, 28)),
            layers.Conv2D(32, 3, activation="relu", **first),
            layers.Conv2D(64, 3, activation="relu", **first),
            layers.MaxPooling2D(3, **first),
            layers.Dropout(0.5),
            layers.Flatten(data_format="channels_last"),
            layers.Dense(250, activation="sigmoid"),
            layers.Dense(10, activation="softmax"),
        ]
    )
    from_keras(keras_model)  # compares the probabilities


def test_a_wrong_flatten_order_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    keras_model = keras_tutorial()
    keras_model.set_weights([weights * 3 for weights in keras_model.get_weights()])
    monkeypatch.setattr("mnist_lit.convert._flatten_order", lambda layers: np.arange(4096))
    with pytest.raises(UserError, match="its probabilities differ by"):
        from_keras(keras_model)


def changed(position: int, layer: Any) -> Any:
    """The tutorial's Keras model with one layer replaced or removed."""
    replaced = [*keras_tutorial().layers]
    replaced[position : position + 1] = [layer()] if layer else []
    return keras.Sequential(
        [keras.Input((28, 28, 1)), *(type(old).from_config(old.get_config()) for old in replaced[1:])]
    )


@pytest.mark.parametrize(
    ("position", "layer", "difference"),
    [
        (
            6,
            lambda: keras.layers.Dense(128, activation="sigmoid"),
            "this project's dense1.* has units=128 instead of 250",
        ),
        (6, lambda: keras.layers.Dense(250, activation="relu"), "dense1.* has activation=relu instead of sigmoid"),
        (
            2,
            lambda: keras.layers.Conv2D(64, 5, activation="relu"),
            r"conv2.* has kernel_size=\[5, 5\] instead of \[3, 3\]",
        ),
        (3, lambda: keras.layers.MaxPooling2D(2), r"pool.* has pool_size=\[2, 2\] instead of \[3, 3\]"),
        (4, None, "the layers are Conv2D, Conv2D, MaxPooling2D, Flatten, Dense, Dense instead of"),
    ],
)
def test_another_architecture_is_refused_with_the_difference(
    position: int, layer: Any, difference: str, tmp_path: Path
) -> None:
    changed(position, layer).save(tmp_path / "other.keras")
    with pytest.raises(UserError, match=difference):
        convert(str(tmp_path / "other.keras"), str(tmp_path / "model.ckpt"))
    assert [path.name for path in tmp_path.iterdir()] == ["other.keras"]


def test_files_that_cannot_be_converted_are_refused(finished_run: Path, tmp_path: Path) -> None:
    checkpoint = str(finished_run / "checkpoints" / "last.ckpt")
    for name in ("empty.keras", "empty.ckpt", "text.keras", "text.ckpt"):
        (tmp_path / name).write_text("" if "empty" in name else "this is not a model")
    for source, target, sentence in (
        (
            checkpoint,
            str(tmp_path / "model.onnx"),
            "one must end in .ckpt, the other in .weights.h5 or .keras or .hdf5 or .h5",
        ),
        (str(tmp_path / "text.keras"), str(tmp_path / "model.h5"), "one must end in .ckpt"),
        (str(tmp_path / "no.h5"), str(tmp_path / "model.ckpt"), "no such file"),
        (str(tmp_path / "no.keras"), str(tmp_path / "model.ckpt"), "no such file"),
        (checkpoint, str(tmp_path / "empty.keras"), "exists already"),
        (checkpoint, str(tmp_path / "nowhere" / "model.keras"), "there is no folder"),
        (str(tmp_path / "empty.keras"), str(tmp_path / "model.ckpt"), "not a model as Keras saves it"),
        (str(tmp_path / "text.keras"), str(tmp_path / "model.ckpt"), "not a model as Keras saves it"),
        (str(tmp_path / "empty.ckpt"), str(tmp_path / "model.keras"), "not a checkpoint"),
        (str(tmp_path / "text.ckpt"), str(tmp_path / "model.keras"), "not a checkpoint"),
    ):
        with pytest.raises(UserError, match=sentence):
            convert(source, target)
    assert len(list(tmp_path.iterdir())) == 4
    convert(checkpoint, str(tmp_path / "empty.keras"), overwrite=True)
    assert to_keras(load_checkpoint(Path(checkpoint))).count_params() == 1_045_576


def test_a_calibrated_model_gives_the_same_probabilities_in_keras(finished_run: Path, tmp_path: Path, sample) -> None:
    content = torch.load(finished_run / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save({**content, "temperature": 1.7}, tmp_path / "warm.ckpt")
    convert(str(tmp_path / "warm.ckpt"), str(tmp_path / "model.keras"))
    keras_model = keras.models.load_model(tmp_path / "model.keras")
    images, _ = next(iter(sample.test_dataloader()))
    with torch.inference_mode():
        ours = load(tmp_path / "warm.ckpt")(images).numpy()
    np.testing.assert_allclose(keras_model.predict(images_for(keras_model, images), verbose=0), ours, atol=1e-5)
