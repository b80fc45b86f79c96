"`classifier` trains, is stored, and judges; unknown labels do not count"

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import ldebm.data
from ldebm import classifier as cl
from ldebm.core import make_gen
from ldebm.image_job import ImageJob, open_job
from ldebm.image_sets import load_images
from ldebm.images import ImageBatch, Images
from ldebm.records import Run
from ldebm.train import TrainCfg, fit


def value(m):
    return m["value"]


def two_attributes(n=240):
    "A bright half (left or right) in one of three grey levels"
    g = make_gen(0, "pictures")
    y = torch.stack([torch.randint(2, (n,), generator=g), torch.randint(3, (n,), generator=g)], 1)
    px = torch.zeros(n, 1, 8, 8, dtype=torch.uint8)
    for p, (side, level) in zip(px, y.tolist()):
        p[:, :, 4 * side : 4 * side + 4] = 80 * (level + 1)
    return Images("halves", px, y, dict(side=("left", "right"), level=("dark", "grey", "light")))


@pytest.mark.parametrize("kind,width", [("mlp", 32), ("conv", 4)])
def test_fit_trains_two_attributes(tmp_path, kind, width):
    data = two_attributes()
    ims = dict(train=data.subset(slice(0, 200)), valid=data.subset(slice(200, 240)))
    net = cl.Classifier(data.shape, {k: len(v) for k, v in data.attributes.items()}, kind, width, 16, gen=make_gen(0))
    task = cl.ClassifierTask(ims, net, batch_size=50, noise=0.02)
    fit(task, Run(tmp_path / "run", dict(kind=kind)), TrainCfg(steps=120, lr=5e-3, warmdown=1.0, clip=10.0), seed=0)
    acc = cl.accuracy(net, ims["valid"])
    assert list(acc) == ["side", "level"] and min(map(value, acc.values())) >= 0.95
    assert task.validate()["error"] == pytest.approx(1 - np.mean([value(v) for v in acc.values()]))
    path = cl.save_classifier(tmp_path / "net.safetensors", net, what="halves")
    again = cl.load_classifier(path)
    assert not again.training and again.heads == net.heads
    assert_close(cl.features_of(again, data, chunk=33), cl.features_of(net, data.x()), rtol=1e-5, atol=1e-6)
    # control: everything asked for must be there; what is not asked for does not matter
    want = ims["valid"].labels.clone()
    assert value(cl.control_accuracy(net, ims["valid"], want)) >= 0.95
    want[:, 1] = -1
    assert value(cl.control_accuracy(net, ims["valid"], want)) >= 0.95
    want[:, 0] = 1 - want[:, 0]
    assert value(cl.control_accuracy(net, ims["valid"], want)) <= 0.05
    with pytest.raises(ValueError, match="no value"):
        cl.control_accuracy(net, ims["valid"], torch.full((40, 2), -1))
    with pytest.raises(ValueError, match="shape"):
        cl.control_accuracy(net, ims["valid"], torch.zeros(40, dtype=torch.long))


def test_unknown_labels_do_not_count():
    net = cl.Classifier((1, 8, 8), [2, 3], gen=make_gen(0))
    model = cl.ClassifierModel(net).eval()
    x = torch.rand(6, 1, 8, 8, generator=make_gen(1))
    y = torch.tensor([[0, -1], [-1, 2], [1, 1], [-1, -1], [0, 0], [1, 2]])
    out = model(ImageBatch(x, y, torch.arange(6)))
    assert out["nll"][3] == 0 == out["error"][3]
    lp = [o.log_softmax(-1) for o in net(x)]
    assert_close(out["nll"][0], -lp[0][0, 0])
    assert_close(out["nll"][2], -lp[0][2, 1] - lp[1][2, 1])
    acc = cl.accuracy(net, x, y)
    assert [m["n"] for m in acc.values()] == [4, 4]


def test_same_generator_same_weights():
    a, b = (cl.Classifier((3, 16, 16), 4, "conv", 4, gen=make_gen(0, "n")) for _ in range(2))
    c = cl.Classifier((3, 16, 16), 4, "conv", 4, gen=make_gen(1, "n"))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.penultimate.weight, c.penultimate.weight)


def test_features_leave_the_network_as_it_was():
    net = cl.Classifier((1, 8, 8), 3, "conv", 4, gen=make_gen(0)).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    f = cl.features_of(net, torch.rand(10, 1, 8, 8))
    assert net.training and not f.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())  # batch statistics included


def test_classifier_errors(tmp_path):
    with pytest.raises(ValueError, match="'mlp' or 'conv'"):
        cl.Classifier((1, 8, 8), 10, "resnet")
    with pytest.raises(ValueError, match="two classes"):
        cl.Classifier((1, 8, 8), {"a": 1})
    with pytest.raises(ValueError, match="one of digits"):
        cl.make_classifier(two_attributes(3), "huge")
    with pytest.raises(ValueError, match="attributes"):
        cl.ClassifierTask(dict(train=two_attributes(3)), cl.Classifier((1, 8, 8), 2))
    with pytest.raises(ValueError, match="no pictures"):
        cl.features_of(cl.Classifier((1, 8, 8), 2), torch.zeros(0, 1, 8, 8))
    from ldebm.core import save_tensors

    with pytest.raises(ValueError, match="no classifier"):
        cl.load_classifier(save_tensors(tmp_path / "x.safetensors", dict(a=torch.zeros(1))))


def test_augment():
    x = torch.rand(50, 2, 6, 5, generator=make_gen(0))
    assert_close(cl.augment(x, make_gen(1)), x)
    flipped = cl.augment(x, make_gen(1), flip=True)
    same, mirror = [(flipped == o).flatten(1).all(1) for o in (x, x.flip(-1))]
    assert (same ^ mirror).all() and 5 < int(same.sum()) < 45
    moved = cl.augment(x, make_gen(1), shift=1)
    inner = moved[:, :, 1:-1, 1:-1]
    options = torch.stack([x[:, :, 1 + i : 5 + i, 1 + j : 4 + j] for i in (-1, 0, 1) for j in (-1, 0, 1)])
    hit = (options == inner).flatten(2).all(2)
    assert (hit.sum(0) == 1).all() and (hit.sum(1) > 0).sum() >= 7
    noisy = cl.augment(torch.zeros(200, 1, 8, 8), make_gen(1), noise=0.3)
    assert noisy.std() == pytest.approx(0.3, rel=0.05)


def test_a_frozen_classifier_is_the_one_that_came_with_the_repository(tmp_path, monkeypatch):
    net = cl.frozen_classifier("cifar10")
    assert net.heads == {"class": 10} and net.shape == (3, 32, 32) and not net.training
    with pytest.raises(ValueError, match="no frozen classifier 'cifar100'; there is cifar10"):
        cl.frozen_classifier("cifar100")
    monkeypatch.setenv("LDEBM_DATA", str(tmp_path))
    (tmp_path / "classifiers").mkdir()
    cl.save_classifier(
        tmp_path / "classifiers/cifar10.safetensors", cl.Classifier((3, 32, 32), {"class": 10}, "conv", 4)
    )
    with pytest.raises(ValueError, match="wrong checksum"):
        cl.frozen_classifier("cifar10")
    monkeypatch.setattr(ldebm.data, "data_root", lambda: [tmp_path / "none"])
    with pytest.raises(FileNotFoundError, match="clf_preset=medium clf_steps=12000"):
        cl.frozen_classifier("cifar10")


@pytest.mark.parametrize("dataset", ["digits", "shapes"])
def test_a_frozen_classifier_refuses_other_pictures(dataset, tmp_path):
    job = ImageJob(dataset, out=str(tmp_path / "run"), settings="clf_preset=cifar10")
    with pytest.raises(ValueError, match="clf_preset=cifar10 measures pictures of .* these are of"):
        open_job(job)
    assert not (tmp_path / "run").exists()


@pytest.mark.data
@pytest.mark.slow
def test_a_frozen_classifier_reads_the_test_pictures(ldebm_data):
    test = load_images("cifar10")["test"]
    assert value(cl.accuracy(cl.frozen_classifier("cifar10"), test)["class"]) >= 0.85
