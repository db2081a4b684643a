"""Every kind of source that can be read twice keeps the contract."""

from __future__ import annotations

from fractions import Fraction

import av
import pytest
from PIL import Image
from source_contract import HEIGHT, NUM_FRAMES, TRANSFORM, WIDTH, FrameSourceContract, picture

from ttt_video.data import BaseSource
from ttt_video.data.ordering import FirstFrames
from ttt_video.data.sources import DatasetSource, FolderSource, VideoFileSource


def write_frames(folder) -> list[str]:
    folder.mkdir()
    files = [folder / f"{index}.png" for index in range(NUM_FRAMES)]
    for index, file in enumerate(files):
        Image.fromarray(picture(index)).save(file)
    return [str(file) for file in files]


class TestFolder(FrameSourceContract):
    @pytest.fixture(params=[0, 2])
    def source(self, tmp_path, request):
        write_frames(tmp_path / "video")
        return FolderSource(tmp_path / "video", TRANSFORM, prefetch=request.param)


class Own(BaseSource):
    """The least that a source of one's own has."""

    video_id = "own"

    def __init__(self, frames) -> None:
        self.frames = frames

    def __iter__(self):
        return (
            {**frame, "image": frame["image"].clone(), "video_id": "own"} for frame in self.frames
        )


class TestOwn(FrameSourceContract):
    @pytest.fixture
    def source(self, tmp_path):
        write_frames(tmp_path / "video")
        return Own(list(FolderSource(tmp_path / "video", TRANSFORM)))


class TestFirstFrames(FrameSourceContract):
    @pytest.fixture
    def source(self, tmp_path):
        files = write_frames(tmp_path / "video")
        Image.open(files[-1]).save(tmp_path / "video" / "9.png")
        return FirstFrames(FolderSource(tmp_path / "video", TRANSFORM), NUM_FRAMES)


class TestDataset(FrameSourceContract):
    @pytest.fixture
    def source(self, tmp_path):
        records = [
            {"file_name": file, "video_id": "a", "frame_index": index, "sem_seg_file_name": "l"}
            for index, file in enumerate(write_frames(tmp_path / "video"))
        ]
        return DatasetSource(records[::-1], TRANSFORM)

    def test_labels_are_passed_on(self, source):
        assert [frame["sem_seg_file_name"] for frame in source] == ["l"] * NUM_FRAMES


class TestVideoFile(FrameSourceContract):
    @pytest.fixture(params=["mp4", "mkv"])
    def source(self, tmp_path, request):
        path = tmp_path / f"video.{request.param}"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=Fraction(10), options={"crf": "4"})
            stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
            for index in range(NUM_FRAMES):
                frame = av.VideoFrame.from_ndarray(picture(index), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return VideoFileSource(path, TRANSFORM)
