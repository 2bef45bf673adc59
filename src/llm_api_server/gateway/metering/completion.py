"""The end of every request: its log line, its ledger row, its quota, and the headers that its response gets."""

from __future__ import annotations

from llm_api_server.gateway.http.header_lines import lines_of
from llm_api_server.gateway.metering.access_log import AccessLog
from llm_api_server.gateway.metering.admission import AdmissionClient
from llm_api_server.gateway.metering.request_record import RequestRecord
from llm_api_server.gateway.metering.usage_reporter import UsageReporter


class RequestCompletion:
    """Finishes the records of a worker's requests, each once."""

    def __init__(self, log: AccessLog, admission: AdmissionClient, usage: UsageReporter) -> None:
        self.log = log
        self.admission = admission
        self._usage = usage

    def finish(self, record: RequestRecord) -> None:
        """End the row of a request that is over, settle its quota and write its log line; one may raise alone."""
        record.seconds = record.elapsed()
        try:
            self._usage.end(record)
        finally:
            try:
                if record.admission is not None:
                    self.admission.settle(record.admission, record.used)
            finally:
                self.log.add(record)


def common_header_lines(record: RequestRecord) -> bytes:
    """Return the header lines that every response gets: request id, rate limits of the key, extra headers.

    `nosniff`: browsers take a response for what its content type says, not for what it looks like.
    """
    lines = b"x-request-id: %b\r\nx-content-type-options: nosniff\r\n%b" % (
        record.request_id.encode(),
        record.limit_lines or b"",
    )
    return lines + lines_of(record.extra_headers) if record.extra_headers else lines
