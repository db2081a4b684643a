"""``python -m ttt_video COMMAND``, which is ``ttt-video COMMAND``."""

from ttt_video_cli import main

if __name__ == "__main__":
    main()
