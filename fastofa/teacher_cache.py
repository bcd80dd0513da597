"""The public name of `fastofa.teacher.cache.TeacherCache`."""

from fastofa.teacher.cache import TeacherCache as TeacherCache
