"""From media files to batches: decoding, extraction into shards, reading, order of records, the datamodule."""
