"""A transport in memory, for what needs exact control over when a peer reads."""


class Wire:
    """A transport in memory that may fill up."""

    def __init__(self):
        self.protocol = None
        self.written = b""
        self.closed = False
        self.reading = True
        self.room = True

    def get_extra_info(self, name):
        return None

    def is_closing(self):
        return self.closed

    def write(self, data):
        assert not self.closed, "written to after its end"
        self.written += data
        if not self.room:
            self.protocol.pause_writing()

    def get_write_buffer_size(self):
        return 0

    def pause_reading(self):
        self.reading = False

    def resume_reading(self):
        self.reading = True

    def close(self):
        self.closed = True

    abort = close
