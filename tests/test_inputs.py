"""What a user names, as files, and where the answers go: nothing lost, nothing twice, nothing overwritten."""

import io
import os
import pty
import subprocess
import sys
import time
from ctypes.util import find_library
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import ROOT, tone
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.inputs import READABLE, STDIN, UNREADABLE, collect, output_paths, parse_shot, record, write_output
from speechllm import audio
from speechllm.errors import InputError

# Suffixes that do not say how soundfile calls the format.
FORMATS = {
    ".wave": "WAV", ".oga": "OGG", ".opus": "OGG", ".aif": "AIFF", ".aifc": "AIFF", ".snd": "AU", ".sph": "NIST"
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


def test_names_are_kept_as_they_are_each_once(folder: Path) -> None:
    touch("b.wav", "dir/a.wav", "notes.txt")
    named = ["b.wav", "missing.wav", "-", "dir/a.wav", "notes.txt"]
    assert collect(named) == named
    assert collect([*named, "./b.wav", "-", str(folder / "dir" / "a.wav"), "dir/../missing.wav", "dir"]) == named
    assert collect(["./-", "-"]) == ["./-", "-"]  # a file of that name is not standard input
    assert collect([]) == []
    assert audio.STDIN == STDIN
    Path("link.wav").symlink_to("b.wav")
    assert collect(["b.wav", "link.wav"]) == ["b.wav", "link.wav"]
    with pytest.raises(InputError, match="is empty"):
        collect(["b.wav", ""])


def test_a_folder_stands_for_the_audio_below_it(folder: Path) -> None:
    expected = ["d/2.wav", "d/10.FLAC", "d/a.mp3", "d/a 1.opus", "d/a 9/x.ogg", "d/a 10/x.ogg", "d/B.wav", "d/ü.m4a"]
    others = ["d/notes.txt", "d/.hidden.wav", "d/._a.mp3", "d/.git/x.wav", "d/x.raw", "d/video.mp4", "d/a.m4a", "d/wav"]
    touch(*reversed(expected), *others)
    assert collect(["d"]) == expected
    assert collect(["d/"]) == expected
    assert collect([str(folder / "d")]) == [str(folder / file) for file in expected]
    assert collect(["d/B.wav", "d"]) == ["d/B.wav", *(file for file in expected if file != "d/B.wav")]
    os.chdir("d")
    assert collect(["."]) == ["./" + file.removeprefix("d/") for file in expected]


def test_links_to_folders_are_followed_once(folder: Path) -> None:
    touch("d/x.wav", "elsewhere/y.wav")
    Path("d/loop").symlink_to(folder / "d")
    Path("d/more").symlink_to(folder / "elsewhere")
    assert collect(["d"]) == ["d/more/y.wav", "d/x.wav"]
    assert collect(["d", "elsewhere"]) == ["d/more/y.wav", "d/x.wav"]


def test_a_folder_without_audio_is_refused(folder: Path) -> None:
    touch("d/notes.txt", "d/e/.hidden.wav")
    for name in ("d", "./d/"):
        with pytest.raises(InputError, match=f"^{name}: no audio file is in this folder or below it"):
            collect([name])


def test_a_folder_that_cannot_be_read_is_refused(folder: Path) -> None:
    touch("d/x.wav", "d/secret/x.wav")
    folder.chmod(0o755)
    Path("d/secret").chmod(0)
    user = os.geteuid()
    try:
        if user == 0:  # who may read everything
            os.seteuid(65534)
        with pytest.raises(InputError, match=r"^d/secret: this folder cannot be read"):
            collect(["d"])
    finally:
        os.seteuid(user)
        Path("d/secret").chmod(0o700)


def test_patterns_are_expanded_where_the_shell_did_not(folder: Path) -> None:
    touch("x1.wav", "x10.wav", "x2.wav", "x.txt", "d/x3.wav", "d/e/x4.flac", "empty/notes.txt")
    assert collect(["*.wav"]) == ["x1.wav", "x2.wav", "x10.wav"]
    assert collect(["x[12].wav", "x?.wav"]) == ["x1.wav", "x2.wav"]
    assert collect(["**/*.wav"]) == ["d/x3.wav", "x1.wav", "x2.wav", "x10.wav"]
    assert collect(["x*"]) == ["x.txt", "x1.wav", "x2.wav", "x10.wav"]  # as a shell would give them
    assert collect(["?"]) == ["d/e/x4.flac", "d/x3.wav"]  # a folder that matches stands for its audio
    assert collect(["*m*y", "d*"][1:]) == collect(["d"])
    touch("x[12].wav")
    assert collect(["x[12].wav"]) == ["x[12].wav"]  # there is a file of that name
    for pattern in ("*.mp3", "y[12].wav", "empty*"):
        with pytest.raises(InputError) as error:
            collect([pattern])
        assert str(error.value) == f"{pattern}: no such file, and as a pattern it matches none"


@pytest.mark.parametrize("suffix", sorted(READABLE))
def test_the_audio_of_folders_can_be_read(folder: Path, suffix: str) -> None:
    format = FORMATS.get(suffix, suffix[1:].upper())
    subtype = "OPUS" if suffix == ".opus" else None
    content = io.BytesIO()
    soundfile.write(content, tone(0.5), 16000, format=format, subtype=subtype)
    Path(f"a{suffix}").write_bytes(content.getvalue())
    (file,) = collect(["."])
    assert abs(audio.read_audio(file, 16000).shape[1] - 8000) <= 1152


def test_audio_to_be_converted_first_says_so_itself(folder: Path) -> None:
    suffix = min(UNREADABLE)
    Path(f"a{suffix}").write_bytes(b"\xff\xf1 anything")
    (file,) = collect(["."])
    with pytest.raises(InputError, match="convert it first"):
        audio.read_audio(file, 16000)
    touch("a.wav")
    assert collect(["."]) == ["./a.wav"]


def names(*files: str) -> list[str]:
    paths = output_paths(files, "out", ".srt")
    assert list(paths) == list(files)
    return [str(path.relative_to("out")) for path in paths.values()]


def test_outputs_are_named_by_their_input(folder: Path) -> None:
    assert names("a.wav", "d/b.mp3", str(folder / "c"), "-") == ["a.srt", "b.srt", "c.srt", "stdin.srt"]
    assert names("a/x.wav", "b/x.wav", "b/y.wav") == ["a/x.srt", "b/x.srt", "y.srt"]
    assert names("x.wav", "a/x.wav") == ["x.srt", "a/x.srt"]
    assert names("x.wav", "x.flac") == ["x.wav.srt", "x.flac.srt"]
    assert names("../p/a/x.wav", "../p/a/x.mp3", "../p/b/x.wav") == ["a/x.wav.srt", "a/x.mp3.srt", "b/x.srt"]
    assert names("x.wav", "x.flac", "x.wav.mp3") == ["x.wav.srt", "x.flac.srt", "x.wav.mp3.srt"]
    assert names("x.wav", "X.wav") == ["x.wav.srt", "X.wav-2.srt"]  # some file systems would take them for one
    assert names("-", "stdin", "stdin.wav") == ["stdin.srt", "stdin-2.srt", "stdin.wav.srt"]
    assert names() == []


PARTS = st.sampled_from(["a", "b", "A", "a b", "a_b", "x.wav", "x", "é", "e\u0301", "-", "stdin", "a-2", ".x"])
FILES = st.lists(PARTS, min_size=1, max_size=3).map("/".join)


@settings(deadline=None)
@given(st.lists(FILES, unique_by=os.path.normpath))
def test_no_two_files_share_an_output(files: list[str]) -> None:
    paths = output_paths(files, "out", ".srt")
    assert list(paths) == files
    assert len({str(path).casefold() for path in paths.values()}) == len(files)
    for path in paths.values():
        assert path.suffix == ".srt" and path.is_relative_to("out") and ".." not in path.parts


def test_an_output_is_written_whole_or_not_at_all(folder: Path) -> None:
    path = Path("out/d/a.srt")
    for text in ("first ü\n", "second\n"):
        write_output(path, text)
        assert path.read_bytes() == text.encode()
    write_output(path, "name \udcff\n")
    assert path.read_bytes() == b"name \\udcff\n"
    assert [file.name for file in Path("out/d").iterdir()] == ["a.srt"]
    touch("file")
    Path("out/busy.srt/full").mkdir(parents=True)
    for bad in (Path("file/a.srt"), Path("out/busy.srt"), Path("out") / ("x" * 300)):
        with pytest.raises(InputError, match="cannot be written") as error:
            write_output(bad, "text")
        assert str(error.value).startswith(f"{bad}: ")
    assert not list(Path("out").glob(".*"))
    old = os.umask(0o027)
    write_output(Path("mode.txt"), "")
    os.umask(old)
    assert Path("mode.txt").stat().st_mode & 0o777 == 0o640  # as any file that a program writes


def test_a_shot_is_a_file_and_its_answer(folder: Path) -> None:
    touch("a.wav", "a=b.wav", "d/x.wav")
    assert parse_shot("a.wav=angry") == ("a.wav", "angry")
    assert parse_shot("a.wav=1 + 1 = 2") == ("a.wav", "1 + 1 = 2")
    assert parse_shot("a=b.wav= no ") == ("a=b.wav", "no")
    touch("a")
    assert parse_shot("a=b.wav=x=y") == ("a=b.wav", "x=y")
    assert parse_shot("a=b.mp3=x") == ("a", "b.mp3=x")


@pytest.mark.parametrize(
    ("shot", "message"),
    [
        ("a.wav", "write it as FILE=ANSWER"),
        ("", "write it as FILE=ANSWER"),
        ("=angry", "write it as FILE=ANSWER"),
        ("no.wav=angry", "no such file: no.wav"),
        ("no.wav=a=b", "no such file: no.wav"),
        ("-=angry", "no such file: -"),
        ("d=angry", "d is a folder"),
        ("a.wav= ", "has no answer; write it as a.wav=ANSWER"),
    ],
)
def test_a_shot_that_is_none(folder: Path, shot: str, message: str) -> None:
    touch("a.wav", "d/x.wav")
    with pytest.raises(InputError) as error:
        parse_shot(shot)
    assert str(error.value).startswith(f"shot {shot}: ") and message in str(error.value)


RECORD = "import sys; from serve.inputs import record; open(sys.argv[1], 'wb').write(record({}))"
# A device of ALSA that gives a file to whoever records, as fast as it is read.
ALSA = """pcm.default {{ type file slave.pcm {{ type null }} file /dev/null infile {raw} format raw
hint {{ show on description test }} }}"""


def microphone(folder: Path) -> tuple[dict[str, str], np.ndarray]:
    """An environment with a microphone, and the samples heard in it; for machines with PortAudio on ALSA."""
    if not sys.platform.startswith("linux") or find_library("portaudio") is None:
        pytest.skip("a made-up microphone takes Linux with PortAudio; the tests of errors ran")
    heard = (np.arange(20000) % 30000).astype("<i2")
    heard.tofile(folder / "heard.raw")
    (folder / "alsa.conf").write_text(ALSA.format(raw=folder / "heard.raw"))
    return os.environ | {"ALSA_CONFIG_PATH": str(folder / "alsa.conf")}, heard


def test_so_many_seconds_are_recorded(tmp_path: Path) -> None:
    environment, heard = microphone(tmp_path)
    out = tmp_path / "out.wav"
    program = [sys.executable, "-c", RECORD.format("0.25"), str(out)]
    result = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stderr == "microphone: recording; Enter or Ctrl-C stops\n"
    samples, rate = soundfile.read(out, dtype="int16")
    assert samples.shape == (round(0.25 * rate),)
    assert np.array_equal(samples, heard[: len(samples)])


@pytest.mark.parametrize("key", [b"\n", b"\x03"])
def test_enter_and_ctrl_c_stop_the_recording(tmp_path: Path, key: bytes) -> None:
    environment, heard = microphone(tmp_path)
    out = tmp_path / "out.wav"
    terminal, child = pty.openpty()
    program = f"import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n{RECORD.format('')}"
    process = subprocess.Popen(
        [sys.executable, "-c", program, out],
        cwd=ROOT, env=environment, stdin=child, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    assert process.stderr.readline() == b"microphone: recording; Enter or Ctrl-C stops\n"
    time.sleep(0.3)
    os.write(terminal, key)
    assert process.wait(60) == 0, process.stderr.read()
    samples, _ = soundfile.read(out, dtype="int16")
    assert len(samples) > 400
    assert np.array_equal(samples[:400], heard[:400])
    process.stderr.close()
    os.close(terminal)
    os.close(child)


TRY = """{}
from serve.inputs import record
try:
    record(0.1)
except ValueError as error:
    print(error)
"""


def test_what_a_microphone_needs(tmp_path: Path) -> None:
    for seconds in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="seconds to record must be above 0"):
            record(seconds)
    (tmp_path / "alsa.conf").write_text("pcm.default { type hw card 7 }")  # there is no such card, and no other device
    environment = os.environ | {"ALSA_CONFIG_PATH": str(tmp_path / "alsa.conf")}
    missing = "no input device was found" if find_library("portaudio") else "the library PortAudio"
    cases = {"import sys; sys.modules['sounddevice'] = None": "pip install 'speechllm[microphone]'", "": missing}
    for setting, message in cases.items():
        program = [sys.executable, "-c", TRY.format(setting)]
        result = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
        assert (result.returncode, result.stdout.count("\n")) == (0, 1), result.stderr
        assert result.stdout.startswith("microphone: ") and message in result.stdout
