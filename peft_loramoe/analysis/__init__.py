"""Router statistics, traces, expert similarity and plots; closed-book question answering."""

from .answer_scores import AnswerScore, score_answers
from .closed_book import ClosedBookResult, Response, answer_questions
from .comparison import Comparison, compare_results
from .plots import plot_entropy, plot_frontier, plot_group_weights, plot_load, plot_trace
from .questions import Question, read_questions
from .similarity import expert_similarity
from .statistics import RouterStatistics, expert_usage, group_weights, router_statistics
from .trace import RouterTrace, router_trace


__all__ = [
    "AnswerScore",
    "ClosedBookResult",
    "Comparison",
    "Question",
    "Response",
    "RouterStatistics",
    "RouterTrace",
    "answer_questions",
    "compare_results",
    "expert_similarity",
    "expert_usage",
    "group_weights",
    "plot_entropy",
    "plot_frontier",
    "plot_group_weights",
    "plot_load",
    "plot_trace",
    "read_questions",
    "router_statistics",
    "router_trace",
    "score_answers",
]
