"""What can go wrong, as exceptions."""


class QuiverError(Exception):
    """An `error` message of the broker about one request.

    code            one of the protocol's codes, such as "ADAPTER_NOT_FOUND"
    retry_after_ms  set when trying again can help
    """

    def __init__(self, code, message, request_id=None, retry_after_ms=None):
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.request_id = request_id
        self.retry_after_ms = retry_after_ms


class ProtocolError(Exception):
    """The broker sent something that the protocol does not allow (a gap in `seq`, say)."""
