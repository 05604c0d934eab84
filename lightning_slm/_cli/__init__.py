"""What stands behind ``lightning-slm``. Nothing here is public but the command itself."""


class UserError(Exception):
    """What the user asked for cannot be done; the message says why and what to do, and no traceback is shown."""
