"""What all measurements share: clocks, documents, models of any size, targets, reports."""
