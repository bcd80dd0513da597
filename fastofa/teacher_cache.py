"""The public import path of `fastofa.teacher.cache.TeacherCache`."""

from fastofa.teacher.cache import TeacherCache as TeacherCache
