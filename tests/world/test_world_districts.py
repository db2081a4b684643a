"""Streets that lead through districts under changing weather."""

import dataclasses
import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_video.adaptation import build_adapter
from ttt_video.config import load_config
from ttt_video.errors import UserError
from ttt_video.shipped import config_dir
from ttt_video.stream import load_source_model
from ttt_video.sweeps.cells import read_sweep
from ttt_video.training.joint_training import JointTrainer
from ttt_video.world import (
    DISTRICTS_VERSION,
    WORLD_CLASS_IDS,
    WORLD_VERSION,
    WorldVideo,
    datasets,
    render_still,
)
from ttt_video.world.districts import dirty, districts_of, split_of
from ttt_video.world.materials import DISTRICTS, TUNNEL_LAMPS, WEATHERS
from ttt_video.world.scene import ROAD, SIDEWALK, SKY
from ttt_video.world.scenery import lamplight
from ttt_video.world.street import ego_distance
from ttt_video.world.style import draw_style
from ttt_video.world.video import SPLIT_SEEDS, WorldStills

H, W = 48, 96
SEEDS = (3, 1803, 2003)  # of each split; 2003 is no world of a benchmark


def frame_bytes(frame):
    arrays = (frame.image, frame.sem_seg, frame.instances, frame.depth)
    return b"".join(array.tobytes() for array in arrays)


def digest(frames):
    whole = hashlib.sha256()
    for frame in frames:
        whole.update(frame_bytes(frame))
    return whole.hexdigest()[:16]


def of(seed):
    style = draw_style(seed)
    return style, districts_of(style, ego_distance(style, 0.0))


def test_worlds_without_districts_are_those_from_before_there_were_any():
    """The digest was made by the version before."""
    videos = [WorldVideo(s, 400, H, W, ("street", "tunnel", "park")) for s in (3, 1204, 2100)]
    assert digest(v[t] for v in videos for t in (0, 95, 110, 170, 333)) == "93b4a98d84bfe05f"
    assert digest([render_still(7, 16, 32)]) == digest([render_still(7, 16, 32, districts=False)])


def test_same_bytes_as_when_this_version_was_made():
    """A change of the districts' looks must raise DISTRICTS_VERSION: caches hang on it."""
    videos = [WorldVideo(seed, 2000, H, W, districts=True) for seed in SEEDS]
    found = digest(v[t] for v in videos for t in (0, 150, 700, 1750))
    assert (DISTRICTS_VERSION, found) == (1, "bfa4447cf44a8e3f")


def test_frames_do_not_depend_on_order_or_length():
    short, long = (WorldVideo(1801, n, 16, 32, districts=True) for n in (400, 1800))
    forward = [frame_bytes(short[t]) for t in (0, 1, 399)]
    assert [frame_bytes(long[t]) for t in (399, 1, 0)] == forward[::-1]
    assert len(set(forward)) == 3


def test_stills_are_frames_of_the_same_worlds():
    stills = WorldStills("train", 2, 16, 32, districts=True)
    assert frame_bytes(stills[1]) == frame_bytes(render_still(1, 16, 32, districts=True))
    assert frame_bytes(stills[1]) != frame_bytes(render_still(1, 16, 32))


def test_what_is_trained_on_and_what_is_tested_on_do_not_meet():
    for table in (DISTRICTS, WEATHERS):
        names = [name for split in table.values() for name in split]
        assert len(set(names)) == len(names)
        looks = [look for split in table.values() for look in split.values()]
        assert len(set(looks)) == len(looks)
    for one, other in itertools.combinations(DISTRICTS, 2):
        for part in ("walls", "leaves"):  # no colour is in two splits
            first, second = (
                {c for look in DISTRICTS[s].values() for c in getattr(look, part)}
                for s in (one, other)
            )
            assert not first & second
        assert not {*TUNNEL_LAMPS[one]} & {*TUNNEL_LAMPS[other]}
    for split, seeds in SPLIT_SEEDS.items():
        assert {split_of(seeds[0]), split_of(seeds[-1])} == {split}
        for seed in seeds[::100]:
            _, districts = of(seed)
            kinds = {districts.kind(k) for k in range(-3, 30)}
            assert kinds == set(DISTRICTS[split])


def test_a_kind_comes_back_late_and_with_other_shades():
    _, districts = of(1800)
    kinds = [districts.kind(k) for k in range(50)]
    assert all(a != b for a, b in itertools.pairwise(kinds))
    for deck in range(0, 50, 5):
        assert set(kinds[deck : deck + 5]) == set(DISTRICTS["val"])
    style = draw_style(1800)
    starts = [districts.start + (k + 0.5) * districts.stretch for k in range(50)]
    looks = [districts.local(style, z).palette for z in starts]
    assert len(set(looks)) == 50


def test_districts_last_from_9_to_17_seconds_and_follow_each_other():
    for seed in SEEDS:
        style, districts = of(seed)
        assert 9 <= districts.stretch / style.speed <= 17
        stretches = districts.stretches(0.0, 1000.0)
        assert stretches[0][0] <= 0 < stretches[0][1]
        assert stretches[-1][1] > 1000.0
        assert all(a[1] == pytest.approx(b[0]) for a, b in itertools.pairwise(stretches))
        for start, end in stretches:
            middle, near = 0.5 * (start + end), end - 1e-3
            assert districts.local(style, middle) == districts.local(style, near)
            assert districts.index(middle) == districts.index(near)


def test_weather_stays_and_then_changes_without_a_jump():
    style, districts = of(1800)
    haze = np.array([districts.moment(style, t / 10).haze for t in range(1800)])
    known = [weather.haze for weather in WEATHERS["val"].values()]
    stays = np.isclose(haze[:, None], known, rtol=1e-9).any(1)
    assert 0.3 < stays.mean() < 0.7
    assert {round(h, 9) for h in haze[stays]} == {round(h, 9) for h in known}
    assert np.abs(np.diff(haze)).max() < 0.05 * max(known)


def test_exposure_follows_the_light_late():
    """Where the light falls, the picture is darker at first than when the camera has settled."""
    style, districts = of(1800)
    moments = [districts.moment(style, t / 10) for t in range(1800)]
    ambient = np.array([sum(m.ambient) for m in moments])
    exposure = np.array([m.exposure for m in moments])
    falls = np.diff(ambient) < -1e-3
    steady = np.abs(ambient[50:] - ambient[:-50]) == 0
    product = exposure * np.sqrt(ambient)
    assert product[1:][falls].mean() < product[50:][steady].mean()


def test_the_lens_gets_worse():
    style, districts = of(1800)
    white = np.ones((H, W, 3), dtype=np.float32)
    left = []
    for seconds in (0, 20, 60, 180):
        moment = dataclasses.replace(districts.moment(style, seconds), glare=(0.0, 0.0, 0.0))
        left.append(dirty(white, moment).mean())
    assert left[0] == 1.0
    assert all(b < a for a, b in itertools.pairwise(left))
    assert left[-1] > 0.5


def test_lamps_of_a_tunnel_have_a_colour():
    tunnels, lamps = [(0.0, 200.0)], (1.7, 0.95, 0.22)
    light = lamplight(tunnels, np.array([-5.0, 100.0]), lamps)
    np.testing.assert_allclose(light[0], 1.0)
    np.testing.assert_allclose(light[1] / light[1, 0], np.array(lamps) / lamps[0], rtol=1e-3)
    assert light[1].max() < 0.5


def test_some_districts_begin_with_a_tunnel():
    style, districts = of(1803)
    tunnels = districts.tunnels(0.0, 20 * districts.stretch)
    assert 2 <= len(tunnels) <= 12
    for start, end in tunnels:
        assert districts.at(0.5 * (start + end)) == "tunnel"
        assert districts.at(end + 0.1) == "street"
        assert 4 <= (end - start) / style.speed <= 7
        assert districts.index(start + 0.1) == districts.index(end)
    assert districts.tunnels(tunnels[0][1] + 1.0, tunnels[0][1] + 2.0) == []


def test_a_minute_leads_through_places_that_look_different():
    """The ground changes three times as much as without districts."""
    ground = []
    for t in range(0, 900, 150):
        frame = WorldVideo(1801, 900, H, W, districts=True)[t]
        ground.append(frame.image[np.isin(frame.sem_seg, (ROAD, SIDEWALK))].mean(0))
    inside = np.std(ground, axis=0).mean()
    plain = []
    for t in range(0, 900, 150):
        frame = WorldVideo(1801, 900, H, W)[t]
        plain.append(frame.image[np.isin(frame.sem_seg, (ROAD, SIDEWALK))].mean(0))
    assert inside > 3 * np.std(plain, axis=0).mean()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), time=st.integers(0, 10**5), h=st.integers(16, 40))
def test_any_seed_time_and_size(seed, time, h):
    frame = WorldVideo(seed, time + 1, h, 48, districts=True)[time]
    assert set(np.unique(frame.sem_seg)) <= set(WORLD_CLASS_IDS)
    np.testing.assert_array_equal(np.isinf(frame.depth), frame.sem_seg == SKY)


def test_scenes_do_not_go_with_districts():
    with pytest.raises(UserError, match="scenes are park; districts go with the street alone"):
        WorldVideo(0, 1, H, W, ("park",), districts=True)


def test_the_rows_of_the_sweeps_are_built_as_written(tmp_path):
    model = None
    for name in ("districts", "fair_table"):
        sweep = read_sweep(config_dir() / "sweeps" / f"{name}.yaml", tmp_path)
        for cell in {cell.name: cell for cell in sweep.cells}.values():
            preset = cell.flag("--preset")
            opts = [word for pair in cell.overrides.items() for word in pair]
            cfg = load_config(cell.flag("--config"), preset, opts, method=cell.method)
            assert not cfg.TTT.RECON.NORMALIZE_TARGET
            if cell.method == "online_ttt_mae":
                adam = preset == "release"
                assert ("ADAMW" if adam else "SGD") == cfg.TTT.OPTIMIZER.NAME
                assert bool(cfg.TTT.OPTIMIZER.SOURCE_GRADIENTS) == (preset is None)
            model = model or load_source_model(cfg)
            assert build_adapter(cfg, model) is not None


@pytest.mark.slow
def test_the_training_of_the_config_takes_a_step(tmp_path, monkeypatch):
    """On stills with and without districts, from shipped weights whose targets are normalised."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr(datasets, "STILL_HEIGHT", 32)
    monkeypatch.setattr(datasets, "STILL_WIDTH", 64)
    for stills in ("NUM_STILLS", "NUM_DISTRICT_STILLS"):
        monkeypatch.setattr(datasets, stills, {"train": 2, "val": 1})
    opts = ["SOLVER.MAX_ITER", "1", "SOLVER.IMS_PER_BATCH", "2", "DATASETS.TEST", "()"]
    opts += ["OUTPUT_DIR", str(tmp_path / "out"), "MODEL.MASK_FORMER.TRAIN_NUM_POINTS", "16"]
    trainer = JointTrainer(load_config("quick/joint_districts.yaml", opts=opts))
    trainer.resume_or_load(False)
    trainer.train()
    assert (tmp_path / "out" / "model_final.pth").is_file()
    for version in (f"v{WORLD_VERSION}", f"districts-v{DISTRICTS_VERSION}"):
        folder = tmp_path / "world_stills" / version / "32x64" / "train"
        assert sorted(path.name for path in folder.iterdir()) == [
            "0000_0.png", "0000_0_sem.png", "0001_0.png", "0001_0_sem.png"
        ]  # fmt: skip
    loss = trainer.storage.history("loss_recon").latest()
    assert 0 < loss < 10
