"""What several parts of the package write: files, the machine, regions of Markdown, charts."""
