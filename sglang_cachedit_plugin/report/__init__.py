"""What a request did: its report, the metrics, the table."""
