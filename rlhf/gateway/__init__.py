"""An OpenAI-compatible server before several served models: who is asked, what users say of the
answers, and how the test between the models stands.
"""
