"""Sound files by DALI's audio decoder, at their own rate; swresample resamples them, as it does all sound.

For files of sound alone in WAV, FLAC and Ogg Vorbis, of one or two channels. What else DALI could read is left to
FFmpeg: of Opus it gives the rate that the file names as its source's, 24 kHz say, where the codec itself runs at
48 kHz, so the waveform would be another one; and more than two channels are not in one order everywhere.
"""

from io import BufferedReader

import numpy as np
import torch
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.error import FFmpegError
from torch import Tensor

from omnigrpo.media.clip_error import Deadline
from omnigrpo.media.decode_dali import DaliFailure, dali_decoder
from omnigrpo.media.sound import place, resampled
from omnigrpo.media.tracks import Track, Window

_CODECS = {
    "wav": frozenset(("pcm_u8", "pcm_s16le", "pcm_s24le", "pcm_s32le", "pcm_f32le", "pcm_f64le")),
    "flac": frozenset(("flac",)),
    "ogg": frozenset(("vorbis", "flac")),
}
"""What is decoded of each container, by FFmpeg's names."""
_LAYOUTS = {1: "mono", 2: "stereo"}


def is_for_dali(track: Track[AudioStream]) -> bool:
    """Whether DALI gives this file's samples as FFmpeg does."""
    stream = track.stream
    container, codec = stream.container, stream.codec_context
    codecs = _CODECS.get(container.format.name, frozenset())
    is_alone = len(container.streams) == 1
    return is_alone and codec.codec.canonical_name in codecs and codec.channels in _LAYOUTS


def decode_waveform_by_dali(
    file: BufferedReader, track: Track[AudioStream], window: Window, sample_rate_hz: int, deadline: Deadline
) -> Tensor | DaliFailure:
    """As ``decode_waveform``, of a whole file that is for DALI; equal to it within 1e-4.

    Raises ClipError as ``place``, and TIMEOUT.
    """
    position = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(position)
    with dali_decoder(torch.device("cpu"), 1) as decoder:
        sound = decoder.decode_sound(content)
    deadline.check()
    if isinstance(sound, DaliFailure):
        return sound
    codec = track.stream.codec_context
    expected = (codec.sample_rate, codec.channels)
    got = (sound.sample_rate_hz, sound.samples_TC.shape[1])
    if got != expected:
        return DaliFailure(
            reason=f"it reads {got[1]} channels at {got[0]} Hz, FFmpeg {expected[1]} at {expected[0]}"
        )
    frame = AudioFrame.from_ndarray(
        np.ascontiguousarray(sound.samples_TC.T), format="fltp", layout=_LAYOUTS[codec.channels]
    )
    frame.sample_rate = sound.sample_rate_hz
    try:
        start_seconds = _first_sound_seconds(track)
    except FFmpegError as error:
        return DaliFailure(reason=f"FFmpeg does not decode its first sound: {error.strerror}")
    return place([resampled([frame], start_seconds, sample_rate_hz)], window, sample_rate_hz)


def _first_sound_seconds(track: Track[AudioStream]) -> float:
    """Container time of the first sample; of Vorbis it is not the first packet's, which gives none."""
    times = (frame.time for packet in track.packets for frame in track.stream.decode(packet))
    first = next(times, None)
    track.stream.codec_context.flush_buffers()
    return (track.start_seconds or 0.0) if first is None else first
