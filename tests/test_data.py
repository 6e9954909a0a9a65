"""The data module: the right pixels, every image once, in a new order each epoch, and honest splits."""

import stat
from pathlib import Path

import pytest
import torch
from helpers import assert_same
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor
from torchvision.transforms.functional import to_pil_image

from mnist_lit import UserError
from mnist_lit.batches import EpochBatches, epoch_order
from mnist_lit.data import MNISTDataModule, scale, stratified_choice


def test_scaling_is_bit_equal_to_totensor() -> None:
    every_value = torch.arange(256, dtype=torch.uint8).repeat(4)[:784].reshape(28, 28)
    for pixels in (every_value, every_value.flip(0)):
        assert_same(scale(pixels), ToTensor()(to_pil_image(pixels)))


def test_batches_are_torchvisions_images_and_labels(full_data_dir: str) -> None:
    data = MNISTDataModule(dir=full_data_dir, source="mnist")
    data.prepare_data()
    data.setup()
    for train, loader in ((True, data.train_dataloader()), (False, data.test_dataloader())):
        reference = MNIST(full_data_dir, train=train, transform=ToTensor())
        indices = next(iter(loader.sampler))
        images, labels = next(iter(loader))
        assert images.shape == (500, 1, 28, 28) and images.dtype == torch.float32
        for index, image, label in zip(indices[:100].tolist(), images, labels, strict=False):
            assert_same(image, reference[index][0])
            assert label == reference[index][1]


def test_an_epoch_has_every_image_once_and_the_next_another_order() -> None:
    batches = EpochBatches(count=1000, batch_size=300, seed=0)
    orders = []
    for epoch in (0, 1):
        batches.set_epoch(epoch)
        assert [len(batch) for batch in batches] == [300, 300, 300, 100]
        orders.append(torch.cat(list(batches)))
        assert_same(orders[-1].sort().values, torch.arange(1000))
    assert not torch.equal(*orders)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    torch.manual_seed(1)
    first = epoch_order(3, 4, 100)
    torch.manual_seed(2)
    assert_same(first, epoch_order(3, 4, 100))
    orders = {tuple(epoch_order(seed, epoch, 100).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_each_batch_so_that_every_image_counts_once(processes: int) -> None:
    shares = [list(EpochBatches(10_000, 480, None, rank, processes)) for rank in range(processes)]
    for parts in zip(*shares, strict=True):
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert_same(torch.cat([batch for share in shares for batch in share]).sort().values, torch.arange(10_000))


def test_split_is_stratified_fixed_and_from_the_training_images_only() -> None:
    splits = [MNISTDataModule(source="sample", val_size=400, seed=seed) for seed in (0, 1)]
    for data in splits:
        torch.manual_seed(data.seed)
        data.setup()
    one, other = splits
    assert_same(one.val_images, other.val_images)
    assert one.val_labels.bincount().tolist() == [40] * 10
    assert len(one.train_labels) == 3600 and one.facts["val"] == 400

    whole = MNISTDataModule(source="sample")
    whole.setup()
    together = torch.cat([one.train_images, one.val_images]).flatten(1)
    assert sorted(map(bytes, together.numpy())) == sorted(map(bytes, whole.train_images.flatten(1).numpy()))
    assert_same(one.test_images, whole.test_images)


def test_stratified_choice_keeps_proportions_to_within_one() -> None:
    labels = torch.repeat_interleave(torch.arange(10), torch.arange(100, 200, 10))
    for size in (0, 1, 17, 145, 1449):
        chosen = labels[stratified_choice(labels, size)]
        assert len(chosen) == size
        for digit in range(10):
            assert abs((chosen == digit).sum() - size * (100 + 10 * digit) / 1450) <= 1


@pytest.mark.parametrize("val_size", [4000, 5000, -1])
def test_29_a_split_that_leaves_nothing_to_train_on_is_refused(val_size: int) -> None:
    with pytest.raises(UserError, match=f"data.val_size={val_size}: must be from 0 to 3999"):
        MNISTDataModule(source="sample", val_size=val_size).setup()


def test_loaders_do_not_draw_from_the_global_generator(sample) -> None:
    before = torch.get_rng_state()
    next(iter(sample.train_dataloader()))
    assert_same(before, torch.get_rng_state())


def test_test_loader_has_exactly_the_test_images(sample) -> None:
    labels = torch.cat([labels for _, labels in sample.test_dataloader()])
    assert labels.bincount().tolist() == [100] * 10
    assert sample.facts == {
        "name": "mnist-sample",
        "train": 4000,
        "val": 0,
        "test": 1000,
        "sha256": "3efc61a64c59d7d36da2f860a71d8dd0af5cf16233af03d590c2ea9cba3fb565",
    }


def test_full_data_have_exact_counts_and_contain_the_sample_in_training(full_data_dir: str, sample) -> None:
    data = MNISTDataModule(dir=full_data_dir, source="auto")
    data.prepare_data()
    data.setup()
    assert [data.facts[key] for key in ("name", "train", "val", "test")] == ["mnist", 60_000, 0, 10_000]
    training = set(map(bytes, data.train_images.flatten(1).numpy()))
    for images in (sample.train_images, sample.test_images):
        assert all(bytes(image) in training for image in images.flatten(1).numpy())


def test_20_a_read_only_data_folder_works(full_data_dir: str, tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in (Path(full_data_dir) / "MNIST" / "raw").iterdir():
        (raw / file.name).symlink_to(file.absolute())
    raw.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        data = MNISTDataModule(dir=str(tmp_path), source="mnist")
        data.prepare_data()
        data.setup()
        assert data.facts["name"] == "mnist"
        assert len(list(raw.iterdir())) == 4  # nothing written beside the files
    finally:
        raw.chmod(stat.S_IRWXU)
