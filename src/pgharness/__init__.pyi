from pgharness.sdk.classes import Runnable as Runnable
from pgharness.sdk.decorators import batch_processor as batch_processor
from pgharness.sdk.decorators import llm_call as llm_call
from pgharness.sdk.decorators import metric as metric
from pgharness.sdk.decorators import timer as timer
from pgharness.sdk.definition import experiment as experiment
from pgharness.sdk.manual import RunType as RunType
from pgharness.sdk.manual import Tracker as Tracker
from pgharness.sdk.scope import AsyncContext as AsyncContext
from pgharness.sdk.scope import Cancelled as Cancelled
from pgharness.sdk.scope import Context as Context
from pgharness.sdk.scope import TaskFailed as TaskFailed

__version__: str
