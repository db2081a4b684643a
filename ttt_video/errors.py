"""The one exception that stands for a mistake the user can mend."""


class UserError(Exception):
    """Bad input: one clear line with the offending value and the fix.

    Tools print it as ``error: <message>`` and exit with code 2, without a traceback
    (:func:`ttt_video.cli.run_tool`). Anything else that escapes is a defect of ours.
    """
