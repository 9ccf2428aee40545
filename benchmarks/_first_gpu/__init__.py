"""The stages of ``make first-gpu``, what runs them within their time, and the report."""
